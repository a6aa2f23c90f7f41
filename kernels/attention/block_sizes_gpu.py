"""Block sizes of the GPU kernels."""

from typing import NamedTuple

import jax.numpy as jnp


class Blocks(NamedTuple):
  query: int
  key: int
  num_warps: int
  num_stages: int


def triton_blocks(kernel: str, capability: int, head_dim: int, dtype) -> Blocks:
  if jnp.dtype(dtype) == jnp.float32:
    return Blocks(64, 32, 4, 2)
  return Blocks(128, 64, 8, 2)
