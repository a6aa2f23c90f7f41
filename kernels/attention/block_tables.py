"""Which key blocks each query block has to do with: tables of O(Q / block) entries.

B batch, Q query length, N query blocks; q/k queries/keys of one block.
"""

import jax
import jax.numpy as jnp

from kernels.attention.intervals import KeyIntervals


def block_tables(intervals: KeyIntervals, num_keys: int, q: int, k: int) -> jax.Array:
  """Ranges of key blocks of every query block, int32 [B, 4, N]; empty intervals do not count.

  The four are first, last, full_first and full_last: key blocks [first, last) meet an interval of
  the query block, those of [full_first, full_last), within [first, last], lie inside all of them.
  A query block that ends beyond the last query has no full key block, so that a kernel may read
  full blocks of both without bounds.
  """
  start_BxQ, stop_BxQ = intervals
  is_empty_BxQ = stop_BxQ <= start_BxQ

  def over_blocks(reduce, array_BxQ, other, padding):
    array_BxQ = jnp.where(is_empty_BxQ, other, array_BxQ)
    B, Q = array_BxQ.shape
    array_BxQ = jnp.pad(array_BxQ, ((0, 0), (0, -Q % q)), constant_values=padding)
    return reduce(array_BxQ.reshape(B, -1, q), axis=2)

  last_BxN = (over_blocks(jnp.max, stop_BxQ, 0, 0) + k - 1) // k
  first_BxN = jnp.minimum(over_blocks(jnp.min, start_BxQ, num_keys, num_keys) // k, last_BxN)
  full_first_BxN = (over_blocks(jnp.max, start_BxQ, 0, num_keys) + k - 1) // k
  full_first_BxN = jnp.minimum(full_first_BxN, last_BxN)
  full_last_BxN = jnp.minimum(over_blocks(jnp.min, stop_BxQ, num_keys, 0) // k, last_BxN)
  full_last_BxN = jnp.maximum(full_last_BxN, full_first_BxN)
  return jnp.stack([first_BxN, last_BxN, full_first_BxN, full_last_BxN], axis=1)
