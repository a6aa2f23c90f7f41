"""Block sizes of the Triton kernels of attention and decode.

Those of "decode" on Hopper, for head_dim 64 and 128, were the fastest on an H100. The others were
chosen without a GPU: the largest blocks that fit the shared memory with few or no spilled
registers, as `python -m tests.kernels.triton_resources` shows. On a GPU,
`python -m experiments.benchmark tune` prints better rows.
"""

from typing import NamedTuple

import jax.numpy as jnp


class Blocks(NamedTuple):
  """Queries and keys per block, warps per program, and blocks in flight.

  In decode kernels, `query` is the most query rows (queries x heads of a group) per program.
  """

  query: int
  key: int
  num_warps: int
  num_stages: int


# The columns are head_dim 64, 128 and 256. A table serves its compute capability and those up to
# the next table. Decode kernels wait for memory. With 16 KiB of keys per block, three or four
# blocks in flight and several programs, a multiprocessor requests several times the bytes that its
# share of the bandwidth delivers in one memory latency (H200: 4.8 TB/s x 0.7 us / 132 = 25 KiB).
DECODE = {
  "decode": (Blocks(64, 128, 4, 3), Blocks(64, 64, 4, 3), Blocks(32, 32, 4, 3)),
  "decode_int8": (Blocks(64, 64, 4, 4), Blocks(64, 64, 4, 4), Blocks(32, 32, 4, 4)),
}
# Shared memory is 99 KiB for 8.6, 8.9 and 12.0, 163 KiB for 8.0, and 227 KiB for 9.0 and 10.0.
SMALL_MEMORY = {
  "forward": (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2)),
  "query_grad": (Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2), Blocks(32, 32, 4, 2)),
  "key_value_grad": (Blocks(64, 64, 4, 2), Blocks(32, 64, 8, 2), Blocks(16, 32, 4, 2)),
  **DECODE,
}
HALF_PRECISION = {
  80: {
    "forward": (Blocks(128, 64, 4, 2), Blocks(128, 64, 8, 3), Blocks(64, 32, 8, 2)),
    "query_grad": (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
    "key_value_grad": (Blocks(64, 128, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2)),
    **DECODE,
  },
  86: SMALL_MEMORY,
  90: {
    "forward": (Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2)),
    "query_grad": (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2)),
    "key_value_grad": (Blocks(64, 128, 8, 2), Blocks(64, 128, 8, 2), Blocks(32, 64, 8, 2)),
    "decode": (Blocks(64, 32, 4, 2), Blocks(64, 128, 8, 3), Blocks(32, 32, 4, 3)),
    "decode_int8": DECODE["decode_int8"],
  },
  100: {
    "forward": (Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2)),
    "query_grad": (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2)),
    "key_value_grad": (Blocks(64, 128, 8, 2), Blocks(64, 128, 8, 2), Blocks(32, 64, 8, 2)),
    **DECODE,
  },
  120: SMALL_MEMORY,
}
SINGLE_PRECISION = {
  "forward": (Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1), Blocks(16, 32, 4, 1)),
  "query_grad": (Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(16, 16, 4, 1)),
  "key_value_grad": (Blocks(32, 32, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1)),
  "decode": (Blocks(16, 64, 4, 2), Blocks(16, 32, 4, 2), Blocks(16, 16, 8, 2)),
  "decode_int8": (Blocks(16, 64, 4, 2), Blocks(16, 32, 4, 2), Blocks(16, 16, 8, 2)),
}
# Multiprocessors of the largest GPU of each compute capability. Decode runs eight programs on each,
# so that the last programs, which leave some multiprocessors idle, are a small part of the work.
# More programs would write more partial results to merge.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 160, 120: 188}
DECODE_PROGRAMS = {capability: 8 * count for capability, count in MULTIPROCESSORS.items()}
# The fewest key blocks for which a split is worth its merge.
LEAST_SPLIT_BLOCKS = 4


def blocks_for(kernel: str, capability: int, head_dim: int, dtype: jnp.dtype) -> Blocks:
  """Block sizes of one Triton kernel.

  Args:
    kernel: "forward", "query_grad", "key_value_grad", "decode", or "decode_int8" for int8 caches.
    capability: compute capability times ten, at least 80.
    head_dim: 64, 128 or 256.
    dtype: the dtype of the query.
  """
  if jnp.dtype(dtype).itemsize == 4:
    table = SINGLE_PRECISION
  else:
    table = _for_capability(HALF_PRECISION, capability)
  return table[kernel][(64, 128, 256).index(head_dim)]


def decode_programs(capability: int) -> int:
  """The number of programs that keeps a GPU of this compute capability busy until the end."""
  return _for_capability(DECODE_PROGRAMS, capability)


def decode_splits(programs: int, num_heads: int, num_blocks: int) -> int:
  """Splits per cache, given its batch rows x key/value heads and its number of key blocks."""
  return max(1, min(-(-programs // num_heads), num_blocks // LEAST_SPLIT_BLOCKS))


def _for_capability(table: dict, capability: int):
  return table[max(lowest for lowest in table if lowest <= capability)]
