"""The backend for NVIDIA GPUs since Ampere: Triton kernels, through jax-triton.

float32 operands are multiplied as three TensorFloat-32 products ("tf32x3"), as accurate as float32.

R rows, K inputs, N outputs, E groups (experts).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.experts.backend import Backend
from kernels.experts.visits import visits
from kernels.nvidia import TRITON_OPTIONS, compute_capability, triton_is_missing
from kernels.varying import vary_as

# Inputs and outputs are multiples of this.
MULTIPLE = 64


class Blocks(NamedTuple):
  """Sizes of blocks, warps per program, and blocks in flight.

  `inputs` and `outputs` are upper bounds: `_blocks` halves them until they divide the matrix.
  """

  rows: int
  inputs: int
  outputs: int
  num_warps: int
  num_stages: int


# For `product` and `outer`, from the compute capability on. They were chosen without a GPU, as the
# largest blocks that fit the shared memory without spilled registers
# (`python -m tests.kernels.triton_resources`). None has been timed.
HALF_PRECISION = {
  80: (Blocks(128, 32, 128, 4, 4), Blocks(32, 128, 128, 4, 4)),
  86: (Blocks(128, 32, 128, 4, 3), Blocks(32, 128, 128, 4, 3)),
  90: (Blocks(128, 64, 256, 8, 3), Blocks(64, 128, 256, 8, 3)),
  120: (Blocks(128, 32, 128, 4, 3), Blocks(32, 128, 128, 4, 3)),
}
FLOAT32 = (Blocks(64, 32, 64, 4, 2), Blocks(32, 64, 64, 4, 2))


def product(
  x: jax.Array, weight_ExKxN: jax.Array, sizes_E: jax.Array, *, transposed: bool
) -> jax.Array:
  """See `kernels.experts.backend.Product`."""
  from kernels.experts.triton import kernel  # Only GPU installs have Triton.

  num_rows = x.shape[0]
  num_inputs, num_outputs = weight_ExKxN.shape[1:][:: -1 if transposed else 1]
  blocks, _ = _blocks(x.dtype, num_inputs, num_outputs)
  own = visits(sizes_E, -(-num_rows // blocks.rows), blocks.rows)
  out = _call(
    kernel.product,
    (x, weight_ExKxN, own.group_V, own.block_V, own.start_E, own.stop_E, own.num_visits[None]),
    jax.ShapeDtypeStruct((num_rows, num_outputs), x.dtype),
    grid=(own.group_V.shape[0] * (num_outputs // blocks.outputs),),
    blocks=blocks,
    sizes=(num_inputs, num_outputs),
    IS_TRANSPOSED=transposed,
  )
  return jnp.where((jnp.arange(num_rows) < own.stop_E[-1])[:, None], out, 0)


def outer(x_RxK: jax.Array, y_RxN: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """See `kernels.experts.backend.Outer`."""
  from kernels.experts.triton import kernel  # Only GPU installs have Triton.

  K, N, E = x_RxK.shape[1], y_RxN.shape[1], sizes_E.shape[0]
  _, blocks = _blocks(x_RxK.dtype, K, N)
  stop_E = jnp.cumsum(sizes_E)
  return _call(
    kernel.outer,
    (x_RxK, y_RxN, stop_E - sizes_E, stop_E),
    jax.ShapeDtypeStruct((E, K, N), jnp.float32),
    grid=(K // blocks.inputs * (N // blocks.outputs), E),
    blocks=blocks,
    sizes=(K, N),
  )


def unsupported(x_RxK: Any, weight_ExKxN: Any) -> str | None:
  """Why these kernels do not run here, or None; see `kernels.backends.Backend`."""
  if problem := triton_is_missing("ragged_dot"):
    return problem
  if any(size % MULTIPLE for size in weight_ExKxN.shape[1:]):
    return (
      f"it takes inputs and outputs that are multiples of {MULTIPLE}, not "
      f"{weight_ExKxN.shape[1]} and {weight_ExKxN.shape[2]}; use 'ragged_dot'"
    )
  return None


TRITON = Backend("triton", unsupported, product, outer)


def blocks_for(capability: int, dtype: jnp.dtype) -> tuple[Blocks, Blocks]:
  """Blocks of `product` and of `outer` for a GPU."""
  if jnp.dtype(dtype) == jnp.float32:
    return FLOAT32
  return HALF_PRECISION[max(known for known in HALF_PRECISION if known <= capability)]


def _blocks(dtype: jnp.dtype, num_inputs: int, num_outputs: int) -> tuple[Blocks, Blocks]:
  """Blocks whose inputs and outputs divide those of the matrices."""

  def dividing(blocks: Blocks) -> Blocks:
    inputs, outputs = blocks.inputs, blocks.outputs
    while num_inputs % inputs:
      inputs //= 2
    while num_outputs % outputs:
      outputs //= 2
    return blocks._replace(inputs=inputs, outputs=outputs)

  of_product, of_outer = blocks_for(compute_capability(), dtype)
  return dividing(of_product), dividing(of_outer)


def _call(
  kernel: Any,
  arrays: tuple[jax.Array, ...],
  out_type: jax.ShapeDtypeStruct,
  *,
  grid: tuple[int, ...],
  blocks: Blocks,
  sizes: tuple[int, int],
  **constants: Any,
) -> jax.Array:
  import jax_triton

  results = jax_triton.triton_call(
    *arrays,
    kernel=kernel,
    out_type=(out_type,),
    grid=grid,
    num_warps=blocks.num_warps,
    num_stages=blocks.num_stages,
    backend_options=TRITON_OPTIONS,
    INPUTS=sizes[0],
    OUTPUTS=sizes[1],
    ROW_BLOCK=blocks.rows,
    INPUT_BLOCK=blocks.inputs,
    OUTPUT_BLOCK=blocks.outputs,
    PRECISION="tf32x3" if arrays[0].dtype == jnp.float32 else None,
    **constants,
  )
  return vary_as(arrays, results)[0]
