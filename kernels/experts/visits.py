"""Which pairs (block of rows, group) a grouped product computes.

Groups begin and end anywhere, so a block of rows may belong to several groups, and is then visited
once for each of them, one visit after the other. Without empty groups there are at most
blocks + groups - 1 visits. The method is that of MegaBlocks' kernels for TPUs (`megablox` in JAX).

R rows, b rows per block, E groups, V visits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
  """Visits in the order of groups, and so of rows. All arrays are int32.

  Attributes:
    group_V: the group of each visit. Entries from `num_visits` on repeat the last one.
    block_V: the block of rows of each visit.
    start_E: first row of each group.
    stop_E: row after the last of each group.
    num_visits: a scalar.
  """

  group_V: jax.Array
  block_V: jax.Array
  start_E: jax.Array
  stop_E: jax.Array
  num_visits: jax.Array


def visits(sizes_E: jax.Array, num_blocks: int, block: int) -> Visits:
  """The visits of all groups that have rows.

  Args:
    sizes_E: int32, rows per group; their sum is at most num_blocks * block.
    num_blocks: number of blocks.
    block: rows per block.
  """
  stop_E = jnp.cumsum(sizes_E)
  start_E = stop_E - sizes_E
  first_block_E = start_E // block
  visits_E = jnp.where(sizes_E > 0, -(-stop_E // block) - first_block_E, 0)
  visits_stop_E = jnp.cumsum(visits_E)
  num_visits = visits_stop_E[-1]
  visit_V = jnp.minimum(
    jnp.arange(num_blocks + sizes_E.shape[0] - 1, dtype=jnp.int32), jnp.maximum(num_visits - 1, 0)
  )
  # Without any rows, the one entry names a group all the same.
  group_V = jnp.searchsorted(visits_stop_E, visit_V, side="right", method="compare_all")
  group_V = jnp.minimum(group_V.astype(jnp.int32), sizes_E.shape[0] - 1)
  block_V = first_block_E[group_V] + visit_V - (visits_stop_E - visits_E)[group_V]
  block_V = jnp.clip(block_V, 0, num_blocks - 1)
  return Visits(group_V, block_V, start_E, stop_E, num_visits)
