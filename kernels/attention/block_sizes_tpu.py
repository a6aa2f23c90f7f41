"""Block sizes of the TPU kernels, by device kind.

No TPU was at hand. The sizes come from the schedules that libtpu compiles, cycle by cycle,

    python -m experiments.tpu_schedule --kernel=forward --device=v6e --rows=1024 --keys=1024

which tells how much of a block's time the matrix units work. For full blocks, head_dim 128 and
bfloat16 (forward, dQ, dK/dV): v5p 71, 95 and 96 percent of their slots; tpu7x 48, 82 and 87. Blocks
of twice the size win up to a tenth, and lose more at the diagonal and at the edges of documents.

Decode has to compute faster than the memory delivers. With 32 query and 8 key/value heads of 128,

    python -m experiments.tpu_schedule --kernel=decode --device=v6e --rows=32 --keys=512

tells 840 to 850 cycles for a block of 4096 rows of bfloat16, which takes 3840 (v5e), 2650 (v5p),
2240 (v6e) and 1250 (tpu7x) to arrive; on v4 1270 of 3590. int8 blocks of twice the rows take the
same time to arrive and 2550, 2530, 2110 and 2070 to compute, but 15150 on v4, where unpacking int8
is slow: int8 saves memory there, not time.
"""

from typing import NamedTuple

import jax.numpy as jnp

MIB = 2**20


class BlockSizes(NamedTuple):
  """At most so many rows (queries x heads) in a tile, queries in a tile, and keys in a block."""

  rows: int = 1024
  queries: int = 512
  keys: int = 512


# Where a kernel is not listed, the default. Matrix units of v6e and later are so fast that the
# forward kernel needs longer blocks to hide the start of each behind products.
TABLE = {
  "TPU v4": {},
  "TPU v5 lite": {},  # v5e
  "TPU v5": {},  # v5p
  "TPU v6 lite": {"forward": BlockSizes(keys=1024)},  # v6e
  "TPU7x": {"forward": BlockSizes(keys=1024)},
}
# Of the memory next to a core: 16 MiB on v4, which has to suffice, and 64 to 128 MiB since.
VMEM_BYTES = {"TPU v4": 16 * MIB}
DEFAULT_VMEM_BYTES = 32 * MIB
# A row of a query tile up to here, head_dim 256 in bfloat16, leaves room for the scores.
MOST_ROW_BYTES = 512

# Of a block of keys or of values that decode holds; four are: two of each, one on its way.
DECODE_BLOCK_BYTES = 2**20
# Columns of scores that decode works on at once: shorter ones wait for each other.
DECODE_COLUMNS = 2048


def block_sizes(kernel: str, device_kind: str, head_dim: int, dtype: jnp.dtype) -> BlockSizes:
  """Sizes for `kernel`, one of "forward", "query_grad" and "key_grads"."""
  sizes = TABLE.get(device_kind, {}).get(kernel, BlockSizes())
  if head_dim * jnp.dtype(dtype).itemsize > MOST_ROW_BYTES:
    return sizes._replace(rows=sizes.rows // 2)
  return sizes


def vmem_bytes(device_kind: str) -> int:
  """The vector memory that a kernel may take."""
  return VMEM_BYTES.get(device_kind, DEFAULT_VMEM_BYTES)
