"""The definition of the SwiGLU feed-forward network (arXiv 2002.05202).

B batch, S sequence length, M model width, F feed-forward width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (x [B, S, inputs], weights) -> [B, S, outputs] in the dtype of x.
Linear = Callable[[jax.Array, Any], jax.Array]


def dense(x: jax.Array, weight: jax.Array) -> jax.Array:
  """The product with a matrix, in the dtype of x."""
  return jnp.dot(x, weight.astype(x.dtype))


def feed_forward(
  x_BxSxM: jax.Array, gate_MxF: Any, up_MxF: Any, down_FxM: Any, linear: Linear = dense
) -> jax.Array:
  """silu(x gate) * (x up), projected down, [B, S, M]. All in the dtype of x."""
  gate_BxSxF = linear(x_BxSxM, gate_MxF)
  up_BxSxF = linear(x_BxSxM, up_MxF)
  return linear(jax.nn.silu(gate_BxSxF) * up_BxSxF, down_FxM)
