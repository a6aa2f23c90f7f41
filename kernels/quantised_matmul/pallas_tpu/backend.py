"""The backend for TPU v4 and later: one Pallas (Mosaic TPU) kernel that streams codes from HBM.

L layers, B rows, R rows and padding, K inputs, N outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.quantised_matmul.backend import Backend
from kernels.quantised_matmul.matrix import QuantizedMatrix
from kernels.quantised_matmul.pallas_tpu import kernel

# Rows are padded to whole registers of packed bfloat16.
SUBLANES = 16
# With more rows, as when reading a prompt, computing takes longer than reading, and XLA is as good.
MOST_ROWS = 128
# Size of x. The kernel holds two copies.
MOST_BYTES = 2**22


def product(x_BxK: jax.Array, matrix: QuantizedMatrix, layer: jax.Array) -> jax.Array:
  """See `kernels.quantised_matmul.backend.Product`."""
  B = x_BxK.shape[0]
  x_RxK = jnp.pad(x_BxK, ((0, -B % SUBLANES), (0, 0)))
  return kernel.product(x_RxK, matrix, layer)[:B]


def unsupported(x_BxK: jax.Array, matrix: Any) -> str | None:
  """Why this kernel does not run here, or None; see `kernels.backends.Backend`."""
  if not pltpu.is_tpu_device():
    return "it needs a TPU; 'xla' runs everywhere"
  if pltpu.get_tpu_info().generation < 4:
    return "it needs a TPU v4 or later; use 'xla'"
  if x_BxK.dtype == jnp.float16:
    return "TPUs have no float16; use bfloat16 or 'xla'"
  if x_BxK.shape[0] > MOST_ROWS:
    return f"it takes up to {MOST_ROWS} rows, not {x_BxK.shape[0]}; use 'xla'"
  K, p = matrix.num_inputs, kernel.step_rows(matrix)
  if not p:
    return f"{K} inputs are not whole groups in a multiple of 32 rows of codes; use 'xla'"
  if max(x_BxK.shape[0], SUBLANES) * K * x_BxK.dtype.itemsize > MOST_BYTES:
    return f"{x_BxK.shape[0]} rows of {K} inputs overflow its vector memory; use 'xla'"
  return None


PALLAS_TPU = Backend("pallas_tpu", unsupported, product)
