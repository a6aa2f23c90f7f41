"""The definition of the SwiGLU feed-forward network (arXiv 2002.05202).

B batch, S sequence length, M model width, F feed-forward width.
"""

import jax
import jax.numpy as jnp


def feed_forward(
  x_BxSxM: jax.Array, gate_MxF: jax.Array, up_MxF: jax.Array, down_FxM: jax.Array
) -> jax.Array:
  """silu(x gate) * (x up), projected down, [B, S, M]. All in the dtype of x."""
  dtype = x_BxSxM.dtype
  gate_BxSxF = jnp.dot(x_BxSxM, gate_MxF.astype(dtype))
  up_BxSxF = jnp.dot(x_BxSxM, up_MxF.astype(dtype))
  return jnp.dot(jax.nn.silu(gate_BxSxF) * up_BxSxF, down_FxM.astype(dtype))
