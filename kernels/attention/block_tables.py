"""Which blocks of queries and keys meet, as tables of O(S / block) entries.

A query block meets a key block if one of its rows sees one of the block's keys; the block is full
if every row sees every key, so that it needs no mask.

B batch, Q query length, N query blocks, M key blocks, q/k queries/keys per block.
"""

import jax
import jax.numpy as jnp

from kernels.attention.intervals import KeyIntervals

# The rows of a table. All blocks that meet are in [first, stop), and those in
# [full_first, full_stop), within that range, are full.
FIRST, STOP, FULL_FIRST, FULL_STOP = range(4)
# Key blocks that `of_keys` compares with all query blocks at a time.
KEY_BLOCKS_AT_ONCE = 128


def of_queries(
  intervals: KeyIntervals, num_keys: int, q: int, k: int, *, full_with_empty_rows: bool = True
) -> jax.Array:
  """The ranges of key blocks for every query block, int32 [B, 4, N].

  A query block that extends beyond the last query has no full key blocks, so that a kernel can read
  full blocks of both without bounds checks.

  Args:
    intervals: of the queries, [B, Q].
    num_keys: the key length K.
    q: queries per block.
    k: keys per block.
    full_with_empty_rows: whether a block may be full although some rows are empty. The kernel must
      then discard what these rows collect.
  """
  start_BxQ, stop_BxQ = intervals
  is_empty_BxQ = stop_BxQ <= start_BxQ
  is_ignored_BxQ = is_empty_BxQ & full_with_empty_rows
  B, Q = start_BxQ.shape

  def over_blocks(reduce, array_BxQ, padding):
    array_BxQ = jnp.pad(array_BxQ, ((0, 0), (0, -Q % q)), constant_values=padding)
    return reduce(array_BxQ.reshape(B, -1, q), axis=2)

  stop_BxN = over_blocks(jnp.max, jnp.where(is_empty_BxQ, 0, stop_BxQ), 0)
  stop_BxN = (stop_BxN + k - 1) // k
  first_BxN = over_blocks(jnp.min, jnp.where(is_empty_BxQ, num_keys, start_BxQ), num_keys)
  first_BxN = jnp.minimum(first_BxN // k, stop_BxN)
  full_first_BxN = over_blocks(jnp.max, jnp.where(is_ignored_BxQ, 0, start_BxQ), num_keys)
  full_first_BxN = jnp.minimum((full_first_BxN + k - 1) // k, stop_BxN)
  full_stop_BxN = over_blocks(jnp.min, jnp.where(is_ignored_BxQ, num_keys, stop_BxQ), 0)
  full_stop_BxN = jnp.maximum(jnp.minimum(full_stop_BxN // k, stop_BxN), full_first_BxN)
  return jnp.stack([first_BxN, stop_BxN, full_first_BxN, full_stop_BxN], axis=1)


def of_keys(tables_Bx4xN: jax.Array, num_key_blocks: int) -> jax.Array:
  """The transposed table: the ranges of query blocks for every key block, int32 [B, 4, M].

  If starts and stops grow with the query, as in a packed sequence in order, the query blocks that
  meet a key block are contiguous. Otherwise the range includes the blocks between them, and full
  blocks that are not contiguous do not count as full. Memory is O(N + M).
  """
  first_BxN, stop_BxN, full_first_BxN, full_stop_BxN = jnp.moveaxis(tables_Bx4xN, 1, 0)
  N = tables_Bx4xN.shape[2]
  index_N = jnp.arange(N, dtype=jnp.int32)

  def ranges(key_block):
    meets_BxN = (first_BxN <= key_block) & (key_block < stop_BxN)
    is_full_BxN = (full_first_BxN <= key_block) & (key_block < full_stop_BxN)
    stop_B = jnp.max(jnp.where(meets_BxN, index_N + 1, 0), axis=1)
    first_B = jnp.minimum(jnp.min(jnp.where(meets_BxN, index_N, N), axis=1), stop_B)
    full_stop_B = jnp.max(jnp.where(is_full_BxN, index_N + 1, 0), axis=1)
    full_first_B = jnp.min(jnp.where(is_full_BxN, index_N, N), axis=1)
    is_contiguous_B = jnp.sum(is_full_BxN, axis=1) == full_stop_B - full_first_B
    full_first_B = jnp.where(is_contiguous_B, full_first_B, stop_B)
    full_stop_B = jnp.where(is_contiguous_B, full_stop_B, stop_B)
    return jnp.stack([first_B, stop_B, full_first_B, full_stop_B], axis=1)

  key_blocks_M = jnp.arange(num_key_blocks, dtype=jnp.int32)
  return jnp.moveaxis(jax.lax.map(ranges, key_blocks_M, batch_size=KEY_BLOCKS_AT_ONCE), 0, 2)
