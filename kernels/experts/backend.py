"""What a backend of the grouped product provides, and its gradients.

R rows, K inputs, N outputs, E groups (experts).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels.experts.dispatch import no_gradient


class Product(Protocol):
  """Each row times the matrix of its group; rows after the last group give 0."""

  def __call__(
    self, x: jax.Array, weight_ExKxN: jax.Array, sizes_E: jax.Array, *, transposed: bool
  ) -> jax.Array:
    """Returns [R, N] for x [R, K], or if `transposed` [R, K] for x [R, N]; in the dtype of x.

    `transposed` multiplies by the transposed matrix of each group.
    """


class Outer(Protocol):
  """For each group, x.T @ y over the group's rows: the gradients of the weights."""

  def __call__(self, x_RxK: jax.Array, y_RxN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns float32 [E, K, N], 0 for an empty group. Rows after the last group do not count."""


class Backend(NamedTuple):
  """One implementation; see `kernels.backends.Backend`, which gets x and the weights here."""

  name: str
  unsupported: Callable[[Any, Any], str | None]
  product: Product
  outer: Outer


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(
  backend: Backend, x_RxK: jax.Array, weight_ExKxN: jax.Array, sizes_E: jax.Array
) -> jax.Array:
  """The grouped product of a backend, [R, N], with gradients from the same backend."""
  return backend.product(x_RxK, weight_ExKxN, sizes_E, transposed=False)


def _forward(backend, x_RxK, weight_ExKxN, sizes_E):
  return differentiable(backend, x_RxK, weight_ExKxN, sizes_E), (x_RxK, weight_ExKxN, sizes_E)


def _backward(backend, residuals, gradient_RxN):
  x_RxK, weight_ExKxN, sizes_E = residuals
  x_gradient_RxK = backend.product(gradient_RxN, weight_ExKxN, sizes_E, transposed=True)
  weight_gradient_ExKxN = backend.outer(x_RxK, gradient_RxN, sizes_E)
  weight_gradient_ExKxN = weight_gradient_ExKxN.astype(weight_ExKxN.dtype)
  return x_gradient_RxK, weight_gradient_ExKxN, no_gradient(sizes_E)


differentiable.defvjp(_forward, _backward)


def dot(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """A product of matrices in float32; float32 operands are not rounded to bfloat16."""
  precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(
    left, right, dimensions, precision=precision, preferred_element_type=jnp.float32
  )
