"""Block sizes of the GPU kernels.

Chosen without a GPU: the largest blocks that fit the shared memory with few or no spilled
registers, as `python -m tests.kernels.triton_resources` and `tests.kernels.compile_for_gpu` show.
Nothing here has been timed: on a GPU, `python -m experiments.benchmark tune` prints better rows.
"""

from typing import NamedTuple

import jax.numpy as jnp


class Blocks(NamedTuple):
  """Queries and keys of a block, warps of a program, and blocks in flight.

  In decode kernels `query` is the most query rows of a program: queries x heads of a group.
  """

  query: int
  key: int
  num_warps: int
  num_stages: int


# Triton. Columns: head_dim 64, 128, 256; keys: the lowest compute capability that a table is for.
# Decode kernels wait for memory: 16 KiB of keys a block, three or four of them on the way, and
# several programs on a multiprocessor, whose sum is some times what its share of the memory's
# bandwidth takes in a memory access (4.8 TB/s x 0.7 us / 132 = 25 KiB).
DECODE = {
  "decode": (Blocks(64, 128, 4, 3), Blocks(64, 64, 4, 3), Blocks(32, 32, 4, 3)),
  "decode_int8": (Blocks(64, 64, 4, 4), Blocks(64, 64, 4, 4), Blocks(32, 32, 4, 4)),
}
# 8.6, 8.9 and 12.0 have 99 KiB of shared memory; 8.0 has 163 KiB, 9.0 and 10.0 have 227 KiB.
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
    **DECODE,
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
# Decode programs: eight for each multiprocessor of the largest GPU of a kind: the last ones,
# which run beside idle multiprocessors, are a small part. Each writes a result to be merged.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 160, 120: 188}
DECODE_PROGRAMS = {capability: 8 * count for capability, count in MULTIPROCESSORS.items()}
# A split is worth its merge from so many key blocks on.
LEAST_SPLIT_BLOCKS = 4

# Mosaic GPU. Queries (or keys, for their gradients) of a tile: 64 for each of two warpgroups.
MOSAIC_GPU_TILE = 128
# Keys (forward, query_grad) or queries (key_value_grad) of a streamed block, and blocks in flight,
# by head_dim.
MOSAIC_GPU_BLOCKS = {
  "forward": {64: (128, 4), 128: (128, 2), 256: (64, 2)},
  "query_grad": {64: (128, 3), 128: (64, 3), 256: (32, 3)},
  "key_value_grad": {64: (64, 4), 128: (64, 3), 256: (32, 2)},
}


def triton_blocks(kernel: str, capability: int, head_dim: int, dtype: jnp.dtype) -> Blocks:
  """Blocks of one Triton kernel.

  Args:
    kernel: "forward", "query_grad", "key_value_grad", "decode" or "decode_int8" (its cache).
    capability: compute capability times ten, 80 or more.
    head_dim: 64, 128 or 256.
    dtype: of query, key and value.
  """
  if jnp.dtype(dtype).itemsize == 4:
    table = SINGLE_PRECISION
  else:
    table = _of_capability(HALF_PRECISION, capability)
  return table[kernel][(64, 128, 256).index(head_dim)]


def decode_programs(capability: int) -> int:
  """How many programs keep a GPU of this compute capability busy to the end."""
  return _of_capability(DECODE_PROGRAMS, capability)


def decode_splits(programs: int, num_heads: int, num_blocks: int) -> int:
  """Splits of a cache of so many key blocks, given rows of the batch x key/value heads."""
  return max(1, min(-(-programs // num_heads), num_blocks // LEAST_SPLIT_BLOCKS))


def _of_capability(table: dict, capability: int):
  return table[max(lowest for lowest in table if lowest <= capability)]
