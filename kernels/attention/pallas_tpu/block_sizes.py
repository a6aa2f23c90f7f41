"""Block sizes of the TPU kernels, by device kind.

The sizes were chosen without a TPU, from the schedules that libtpu compiles, cycle by cycle:

    python -m experiments.tpu_schedule --kernel=forward --device=v6e --rows=1024 --keys=1024

prints the share of slots that the matrix units use while they compute a block. For full blocks,
head_dim 128 and bfloat16 it is 71, 95 and 96 percent (forward, dQ, dK/dV) on v5p and 48, 82 and 87
percent on tpu7x. Blocks of twice the size gain up to a tenth there, but lose more at the diagonal
and at the edges of documents.

Decode has to compute a block before the next one arrives from memory. With 32 query heads and 8
key/value heads of 128,

    python -m experiments.tpu_schedule --kernel=decode --device=v6e --rows=32 --keys=512

prints 840 to 850 cycles for a block of 4096 rows of bfloat16, which takes 3840 (v5e), 2650 (v5p),
2240 (v6e) and 1250 (tpu7x) cycles to arrive; on v4 it prints 1270, for 3590. int8 blocks of twice
the rows take as long to arrive and 2550, 2530, 2110 and 2070 cycles to compute, but 15150 on v4,
where unpacking int8 is slow: there int8 saves memory but no time.
"""

from typing import NamedTuple

import jax.numpy as jnp

MIB = 2**20


class BlockSizes(NamedTuple):
  """The most rows (queries x heads) per tile, queries per tile, and keys per block."""

  rows: int = 1024
  queries: int = 512
  keys: int = 512


# A kernel that is not listed takes the default. The matrix units of v6e and later are so fast that
# the forward kernel needs longer blocks to hide the start of each block behind products.
TABLE = {
  "TPU v4": {},
  "TPU v5 lite": {},  # v5e
  "TPU v5": {},  # v5p
  "TPU v6 lite": {"forward": BlockSizes(keys=1024)},  # v6e
  "TPU7x": {"forward": BlockSizes(keys=1024)},
}
# The vector memory (VMEM) that a kernel may use. v4 has 16 MiB, later TPUs have 64 to 128 MiB.
VMEM_BYTES = {"TPU v4": 16 * MIB}
DEFAULT_VMEM_BYTES = 32 * MIB
# Up to this size of a query row, head_dim 256 in bfloat16, the scores of a full tile fit as well.
MOST_ROW_BYTES = 512

# Size of a block of keys or of values in decode. Four are in memory: two of each, so that one can
# arrive while the kernel computes the other.
DECODE_BLOCK_BYTES = 2**20
# Columns of scores that decode works on at once. With fewer, operations wait for each other.
DECODE_COLUMNS = 2048


def block_sizes(kernel: str, device_kind: str, head_dim: int, dtype: jnp.dtype) -> BlockSizes:
  """Block sizes of `kernel`, one of "forward", "query_grad" and "key_grads"."""
  sizes = TABLE.get(device_kind, {}).get(kernel, BlockSizes())
  if head_dim * jnp.dtype(dtype).itemsize > MOST_ROW_BYTES:
    return sizes._replace(rows=sizes.rows // 2)
  return sizes


def vmem_bytes(device_kind: str) -> int:
  """The vector memory that a kernel may use."""
  return VMEM_BYTES.get(device_kind, DEFAULT_VMEM_BYTES)
