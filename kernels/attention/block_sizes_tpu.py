"""Block sizes of the TPU kernels, by device kind."""

from typing import NamedTuple


class BlockSizes(NamedTuple):
  rows: int
  keys: int
  max_queries: int = 512


TABLE = {}


def block_sizes(kernel: str, device_kind: str, head_dim: int, dtype) -> BlockSizes:
  return TABLE.get((kernel, device_kind), BlockSizes(1024, 512))


def vmem_limit(device_kind):
  return {"TPU v4": 16, "TPU v5": 64, "TPU7x": 64}.get(device_kind, 128) * 2**20
