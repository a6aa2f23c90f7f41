"""Compares products with quantized matrices with the same product in floats.

L layers, B rows, K inputs, N outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.benchmarks.timing import failure, seconds
from kernels.quantised_matmul import GRIDS, QuantizedMatrix, api


@dataclasses.dataclass(frozen=True)
class Product:
  """Rows of activations times a matrix; one row is one sequence that generates."""

  rows: int
  inputs: int
  outputs: int
  dtype: str

  def matrix(self, name: str) -> QuantizedMatrix:
    """A matrix of one layer on a grid."""
    grid = GRIDS[name]
    shape = 1, self.inputs * grid.bits // 8, self.outputs
    codes = jax.random.randint(jax.random.key(0), shape, -128, 128, jnp.int8)
    groups = self.inputs // (grid.group or self.inputs)
    scales = jnp.ones((1, groups, self.outputs), jnp.int16 if grid.group else jnp.float32)
    return QuantizedMatrix(grid, codes, scales, scales if grid.has_minimums else None)


def products(platform: str) -> tuple[Product, ...]:
  """The products to measure: Llama 7B's up projection, for one sequence and for 32."""
  dtype = "float32" if platform == "cpu" else "bfloat16"
  return Product(1, 4096, 11008, dtype), Product(32, 4096, 11008, dtype)


def measure_quantised(product: Product) -> list[dict]:
  """One record per grid and backend, after that of a matrix in the dtype of the activations.

  Each has milliseconds, GB/s of weights read, and the speed as a ratio to the float product. A
  backend that supports the arguments but fails has `error` instead.
  """
  x_BxK = jnp.ones((product.rows, product.inputs), product.dtype)
  weight_KxN = jnp.ones((product.inputs, product.outputs), product.dtype)
  floats = seconds(jnp.dot, x_BxK, weight_KxN)
  records = [_record(product, product.dtype, "jax.numpy", floats, weight_KxN.nbytes, floats)]
  for name in GRIDS:
    matrix = product.matrix(name)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(matrix))
    for backend in api.BACKENDS:
      if backend.unsupported(x_BxK, matrix) is not None:
        continue
      try:
        taken = seconds(
          lambda x, matrix, b=backend: api.quantised_matmul(x, matrix, backend=b), x_BxK, matrix
        )
      except Exception as error:
        # A backend may raise anything, also out of memory; the others are still measured.
        records.append({"weights": name, "backend": backend.name, "error": failure(error)})
        continue
      records.append(_record(product, name, backend.name, taken, num_bytes, floats))
  return records


def _record(product, weights: str, backend: str, taken: float, num_bytes: int, floats: float):
  return {
    "weights": weights,
    "backend": backend,
    **dataclasses.asdict(product),
    "ms": taken * 1e3,
    "gigabytes_per_second": num_bytes / taken / 1e9,
    "speed_ratio": floats / taken,
  }
