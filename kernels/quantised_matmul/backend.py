"""What a backend of the quantized product provides.

B rows, K inputs, N outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from kernels.quantised_matmul.matrix import QuantizedMatrix


class Product(Protocol):
  """The product with the matrix of one layer."""

  def __call__(self, x_BxK: jax.Array, matrix: QuantizedMatrix, layer: jax.Array) -> jax.Array:
    """Returns float32 [B, N]."""


class Backend(NamedTuple):
  """One implementation; see `kernels.backends.Backend`, whose key is the matrix here."""

  name: str
  unsupported: Callable[[Any, Any], str | None]
  product: Product
