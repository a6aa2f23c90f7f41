"""Counts the blocks that each device of a ring computes, without running attention.

B batch, S sequence length, Q query length per shard, N query blocks, n ring size.
"""

import jax.numpy as jnp
import numpy as np

from kernels.attention import block_tables
from kernels.attention.intervals import KeyIntervals, within
from kernels.ring.layout import Layout


def blocks_per_device(intervals: KeyIntervals, layout: Layout, block: int) -> np.ndarray:
  """Blocks of `block` queries by `block` keys that each device of a ring computes, int64 [n].

  As in the attention backends, only blocks where a query sees a key count.

  Args:
    intervals: for the whole unpermuted sequence, [B, S].
    layout: how the sequence is laid out over the ring.
    block: queries, and keys, per block.

  Raises:
    ValueError: the sequence length is not divisible by the number of chunks.
  """
  n, S = layout.ring_size, intervals.start_BxQ.shape[1]
  length = layout.chunk_length(S)
  columns_nxQ = layout.permutation(S).reshape(n, -1)
  counts_n = np.zeros(n, np.int64)
  for device in range(n):
    own = KeyIntervals(*(array_BxS[:, columns_nxQ[device]] for array_BxS in intervals))
    for offset in range(0, S, length):
      tables = block_tables.of_queries(within(own, offset, length), length, block, block)
      first_BxN, stop_BxN = tables[:, block_tables.FIRST], tables[:, block_tables.STOP]
      counts_n[device] += int(jnp.sum(stop_BxN - first_BxN))
  return counts_n
