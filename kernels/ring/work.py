"""How much each device of a ring computes: pure counting, nothing runs.

B batch, S sequence, Q query length of a shard, L tokens in a chunk, n ring size.
"""

import jax.numpy as jnp
import numpy as np

from kernels.attention import block_tables
from kernels.attention.intervals import KeyIntervals, within
from kernels.ring.layout import Layout


def blocks_per_device(intervals: KeyIntervals, layout: Layout, block: int) -> np.ndarray:
  """Blocks of `block` queries by `block` keys that each device of a ring computes, int64 [n].

  A block counts if an interval of its queries meets its keys, as in the attention backends.

  Args:
    intervals: of the whole sequence, [B, S], unpermuted.
    layout: how it lies over the ring.
    block: tokens of a side.

  Raises:
    ValueError: the sequence does not divide into the layout's chunks.
  """
  n, S = layout.ring_size, intervals.start_BxQ.shape[1]
  length = layout.chunk_length(S)
  columns_nxQ = layout.permutation(S).reshape(n, -1)
  counts_n = np.zeros(n, np.int64)
  for device in range(n):
    own = KeyIntervals(*(array_BxS[:, columns_nxQ[device]] for array_BxS in intervals))
    for offset in range(0, S, length):
      tables = block_tables.of_queries(within(own, offset, length), length, block, block)
      first_BxN, last_BxN = tables[:, 0], tables[:, 1]
      counts_n[device] += int(jnp.sum(last_BxN - first_BxN))
  return counts_n
