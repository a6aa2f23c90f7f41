"""The entry to products with quantized matrices: picks a backend.

L layers, B rows, K inputs, N outputs.
"""

import jax
import jax.numpy as jnp

from kernels import backends
from kernels.quantised_matmul.backend import Backend
from kernels.quantised_matmul.matrix import QuantizedMatrix
from kernels.quantised_matmul.pallas_tpu import PALLAS_TPU
from kernels.quantised_matmul.xla import XLA
from kernels.varying import vary_trees_alike

# The best first. XLA supports everything.
BACKENDS = (PALLAS_TPU, XLA)


def quantised_matmul(
  x: jax.Array,
  matrix: QuantizedMatrix,
  *,
  layer: jax.Array | int = 0,
  backend: str | Backend | None = None,
) -> jax.Array:
  """x times the matrix of one layer, [..., N]; reads the codes in place, and has no gradient.

  A product with few rows takes as long as the weights take to read, so codes of 8 or 4 bits make
  decoding faster than floats. On a mesh, call it inside `jax.shard_map`; a device's shard of K must
  hold whole groups.

  Args:
    x: float [..., K]. Products run in its dtype and accumulate in float32; a scale that belongs to
      a group multiplies the weights, which are then rounded to that dtype.
    matrix: L layers.
    layer: int32 scalar.
    backend: "pallas_tpu" (TPU, few rows), "xla" (runs everywhere), your own `Backend`, or None for
      the best on this platform.

  Returns:
    float32 [..., N].

  Raises:
    ValueError: no backend has this name, or it does not support the arguments.
  """
  x_BxK = x.reshape(-1, x.shape[-1])
  if not isinstance(backend, Backend):
    backend = backends.choose("quantized product", BACKENDS, backend, x_BxK, matrix)
  x_BxK, matrix, index = vary_trees_alike(x_BxK, matrix, jnp.asarray(layer, jnp.int32))
  return backend.product(x_BxK, matrix, index).reshape(*x.shape[:-1], -1)
