"""Which blocks of queries and keys have to do with each other: tables of O(S / block) entries.

B batch, Q query length, N query blocks, M key blocks; q/k queries/keys of one block.
"""

import jax
import jax.numpy as jnp

from kernels.attention.intervals import KeyIntervals

KEY_BLOCKS_AT_ONCE = 128


def of_queries(intervals: KeyIntervals, num_keys: int, q: int, k: int) -> jax.Array:
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


def of_keys(tables_Bx4xN: jax.Array, num_key_blocks: int) -> jax.Array:
  """The same from the side of the keys: ranges of query blocks of every key block, [B, 4, M].

  Where starts and stops grow with the query, as in a packed sequence in order, the query blocks
  that meet a key block are contiguous; if others stand between them, the range holds those too.
  Full blocks that are not contiguous count as crossed ones. Memory is O(N + M).
  """
  first_BxN, last_BxN, full_first_BxN, full_last_BxN = jnp.moveaxis(tables_Bx4xN, 1, 0)
  N = tables_Bx4xN.shape[2]
  index_N = jnp.arange(N, dtype=jnp.int32)

  def ranges(key_block):
    meets_BxN = (first_BxN <= key_block) & (key_block < last_BxN)
    is_full_BxN = (full_first_BxN <= key_block) & (key_block < full_last_BxN)
    last_B = jnp.max(jnp.where(meets_BxN, index_N + 1, 0), axis=1)
    first_B = jnp.minimum(jnp.min(jnp.where(meets_BxN, index_N, N), axis=1), last_B)
    full_last_B = jnp.max(jnp.where(is_full_BxN, index_N + 1, 0), axis=1)
    full_first_B = jnp.min(jnp.where(is_full_BxN, index_N, N), axis=1)
    is_contiguous_B = jnp.sum(is_full_BxN, axis=1) == full_last_B - full_first_B
    full_first_B = jnp.where(is_contiguous_B, full_first_B, last_B)
    full_last_B = jnp.where(is_contiguous_B, full_last_B, last_B)
    return jnp.stack([first_B, last_B, full_first_B, full_last_B], axis=1)

  key_blocks_M = jnp.arange(num_key_blocks, dtype=jnp.int32)
  return jnp.moveaxis(jax.lax.map(ranges, key_blocks_M, batch_size=KEY_BLOCKS_AT_ONCE), 0, 2)
