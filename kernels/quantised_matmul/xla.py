"""The quantized product in plain JAX. It runs everywhere.

A loop runs over blocks of outputs. Only the codes of one block are turned into floats at a time,
because a whole matrix in floats would take more memory than the codes save, and more time to write
and read than the product.

L layers, B rows, K inputs, N outputs, n outputs per block, P rows of codes, J groups.
"""

import jax
import jax.numpy as jnp

from kernels.quantised_matmul.backend import Backend
from kernels.quantised_matmul.matrix import QuantizedMatrix, dequantize
from kernels.varying import vary_alike

# Weights per block, by platform. On CPUs a block fits into the cache of a core. On GPUs, where XLA
# reads int8 codes within the product, starting the programs of several blocks takes longer.
BLOCK_WEIGHTS = {"cpu": 2**18, "gpu": 2**31}
BLOCK_WEIGHTS_ELSEWHERE = 2**23
# Outputs per block are a multiple of this number, or all.
OUTPUTS = 128


def product(x_BxK: jax.Array, matrix: QuantizedMatrix, layer: jax.Array) -> jax.Array:
  """See `kernels.quantised_matmul.backend.Product`."""
  (B, K), N = x_BxK.shape, matrix.codes.shape[2]
  weights = BLOCK_WEIGHTS.get(jax.default_backend(), BLOCK_WEIGHTS_ELSEWHERE)
  n = min(N, max(weights // K // OUTPUTS, 1) * OUTPUTS)

  def add_block(index, out_BxN):
    # If N is not a multiple of n, the last block starts earlier, and computes some outputs again.
    begin = jnp.minimum(index * n, N - n)
    block = jax.tree.map(
      lambda array: jax.lax.dynamic_slice(array, (layer, 0, begin), (1, array.shape[1], n)), matrix
    )
    block_BxN = _product(x_BxK, block)
    return jax.lax.dynamic_update_slice(out_BxN, block_BxN, (0, begin))

  out_BxN, _ = vary_alike(jnp.zeros((B, N), jnp.float32), x_BxK)
  return jax.lax.fori_loop(0, -(-N // n), add_block, out_BxN)


def _product(x_BxK: jax.Array, matrix: QuantizedMatrix) -> jax.Array:
  """The product with a matrix of one layer."""
  if matrix.grid.group is None:
    out_BxN = jnp.dot(
      x_BxK, matrix.codes[0].astype(x_BxK.dtype), preferred_element_type=jnp.float32
    )
    return out_BxN * matrix.scales[0]
  weight_KxN = dequantize(matrix)[0].astype(x_BxK.dtype)
  return jnp.dot(x_BxK, weight_KxN, preferred_element_type=jnp.float32)


XLA = Backend("xla", lambda x, matrix: None, product)
