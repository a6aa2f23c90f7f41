"""The grouped product as `jax.lax.ragged_dot`, which XLA compiles for every platform.

TPUs have an instruction for it. On CPUs, XLA multiplies every row by the matrices of all groups.

R rows, K inputs, N outputs, E groups (experts).
"""

import jax
import jax.numpy as jnp

from kernels.experts.backend import Backend

# [R, K] and [R, N] with groups of rows, contracted over the rows.
_OUTER = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def product(
  x: jax.Array, weight_ExKxN: jax.Array, sizes_E: jax.Array, *, transposed: bool
) -> jax.Array:
  """See `kernels.experts.backend.Product`."""
  dimensions = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2 if transposed else 1]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
  )
  out = _ragged_dot(x, weight_ExKxN, sizes_E, dimensions).astype(x.dtype)
  # XLA does not say what rows after the last group contain.
  return jnp.where(_in_a_group(x.shape[0], sizes_E), out, 0)


def outer(x_RxK: jax.Array, y_RxN: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """See `kernels.experts.backend.Outer`."""
  return _ragged_dot(x_RxK, y_RxN, sizes_E, _OUTER)


RAGGED_DOT = Backend("ragged_dot", lambda x, weight: None, product, outer)


def _ragged_dot(left, right, sizes_E, dimensions):
  precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
  return jax.lax.ragged_dot_general(
    left, right, sizes_E, dimensions, precision=precision, preferred_element_type=jnp.float32
  )


def _in_a_group(num_rows, sizes_E):
  return (jnp.arange(num_rows) < jnp.sum(sizes_E))[:, None]
