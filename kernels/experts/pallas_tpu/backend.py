"""The backend for TPU v4 and later: Pallas (Mosaic TPU) kernels that visit blocks of rows.

R rows, K inputs, N outputs, E groups (experts).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.experts.backend import Backend
from kernels.experts.pallas_tpu import kernel


def product(
  x: jax.Array, weight_ExKxN: jax.Array, sizes_E: jax.Array, *, transposed: bool
) -> jax.Array:
  """See `kernels.experts.backend.Product`."""
  num_rows = x.shape[0]
  out = kernel.product(_in_blocks(x), weight_ExKxN, sizes_E, transposed=transposed)[:num_rows]
  # The kernel does not write blocks without groups.
  return jnp.where((jnp.arange(num_rows) < jnp.sum(sizes_E))[:, None], out, 0)


def outer(x_RxK: jax.Array, y_RxN: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """See `kernels.experts.backend.Outer`."""
  out_ExKxN = kernel.outer(_in_blocks(x_RxK), _in_blocks(y_RxN), sizes_E)
  # The kernel does not visit empty groups.
  return jnp.where((sizes_E > 0)[:, None, None], out_ExKxN, 0)


def unsupported(x_RxK: jax.Array, weight_ExKxN: Any) -> str | None:
  """Why these kernels do not run here, or None; see `kernels.backends.Backend`."""
  if not pltpu.is_tpu_device():
    return "it needs a TPU; 'ragged_dot' runs everywhere"
  if pltpu.get_tpu_info().generation < 4:
    return "it needs a TPU v4 or later; use 'ragged_dot'"
  if any(size % kernel.LANES for size in weight_ExKxN.shape[1:]):
    return (
      f"it takes inputs and outputs that are multiples of {kernel.LANES}, not "
      f"{weight_ExKxN.shape[1]} and {weight_ExKxN.shape[2]}; use 'ragged_dot'"
    )
  return None


PALLAS_TPU = Backend("pallas_tpu", unsupported, product, outer)


def _in_blocks(x: jax.Array) -> jax.Array:
  """The rows, padded to whole blocks."""
  return jnp.pad(x, ((0, -x.shape[0] % kernel.BLOCK_ROWS), (0, 0)))
