"""Block sizes of the GPU kernels.

Chosen without a GPU: the largest blocks that fit the shared memory with few or no spilled
registers, as `python -m tests.kernels.triton_resources` and `tests.kernels.compile_for_gpu` show.
Nothing here has been timed.
"""

from typing import NamedTuple

import jax.numpy as jnp


class Blocks(NamedTuple):
  """Queries and keys of a block, warps of a program, and blocks in flight."""

  query: int
  key: int
  num_warps: int
  num_stages: int


# Triton. Columns: head_dim 64, 128, 256; keys: the lowest compute capability that a table is for.
# 8.6, 8.9 and 12.0 have 99 KiB of shared memory; 8.0 has 163 KiB, 9.0 and 10.0 have 227 KiB.
SMALL_MEMORY = {
    "forward": (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2)),
    "query_grad": (Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2), Blocks(32, 32, 4, 2)),
    "key_value_grad": (Blocks(64, 64, 4, 2), Blocks(32, 64, 8, 2), Blocks(16, 32, 4, 2)),
}
HALF_PRECISION = {
    80: {
        "forward": (Blocks(128, 64, 4, 2), Blocks(128, 64, 8, 3), Blocks(64, 32, 8, 2)),
        "query_grad": (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
        "key_value_grad": (Blocks(64, 128, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2)),
    },
    86: SMALL_MEMORY,
    90: {
        "forward": (Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2)),
        "query_grad": (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2)),
        "key_value_grad": (Blocks(64, 128, 8, 2), Blocks(64, 128, 8, 2), Blocks(32, 64, 8, 2)),
    },
    100: {
        "forward": (Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2)),
        "query_grad": (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2)),
        "key_value_grad": (Blocks(64, 128, 8, 2), Blocks(64, 128, 8, 2), Blocks(32, 64, 8, 2)),
    },
    120: SMALL_MEMORY,
}
SINGLE_PRECISION = {
    "forward": (Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1), Blocks(16, 32, 4, 1)),
    "query_grad": (Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(16, 16, 4, 1)),
    "key_value_grad": (Blocks(32, 32, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1)),
}

# Mosaic GPU. Queries (or keys, for their gradients) of a tile: 64 for each of two warpgroups.
MOSAIC_GPU_TILE = 128
# Keys (forward, query_grad) or queries (key_value_grad) of a streamed block, and blocks in flight,
# by head_dim.
MOSAIC_GPU_BLOCKS = {
    "forward": {64: (128, 4), 128: (128, 2)},
    "query_grad": {64: (128, 3), 128: (64, 3)},
    "key_value_grad": {64: (64, 4), 128: (64, 3)},
}


def triton_blocks(kernel: str, capability: int, head_dim: int, dtype: jnp.dtype) -> Blocks:
  """Blocks of one Triton kernel.

  Args:
    kernel: "forward", "query_grad" or "key_value_grad".
    capability: compute capability times ten, 80 or more.
    head_dim: 64, 128 or 256.
    dtype: of query, key and value.
  """
  if jnp.dtype(dtype).itemsize == 4:
    table = SINGLE_PRECISION
  else:
    table = HALF_PRECISION[max(lowest for lowest in HALF_PRECISION if lowest <= capability)]
  return table[kernel][(64, 128, 256).index(head_dim)]
