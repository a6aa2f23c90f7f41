"""Rotary position embedding (RoFormer, arXiv 2104.09864), with Hugging Face's layout of pairs.

Element i of a head is rotated together with element i + D/2. Meta's and LWM's checkpoints pair 2i
with 2i + 1 instead; lwm/convert changes their order.

B batch, S sequence, H heads, D head_dim, P = D/2 pairs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lwm.config.model import RopeScaling


def frequencies(
  head_dim: int, theta: float | jax.Array, scaling: RopeScaling | None = None
) -> np.ndarray | jax.Array:
  """Radians per position of each pair, [P]: float64 (NumPy) for a Python theta, else float32.

  Args:
    head_dim: even.
    theta: base; a Python number, or a float32 scalar that may be traced.
    scaling: Llama-3 scaling: frequencies with fewer than `low_frequency_factor` rotations in the
      original context are divided by `factor`, those with more than `high_frequency_factor`
      rotations are kept, with a linear ramp between.
  """
  xp = jnp if isinstance(theta, jax.Array) else np
  pairs = head_dim // 2
  frequency_P = theta ** -(xp.arange(pairs) / pairs)
  if scaling is None:
    return frequency_P
  turns_P = scaling.original_context * frequency_P / (2 * math.pi)
  kept_P = (turns_P - scaling.low_frequency_factor) / (
    scaling.high_frequency_factor - scaling.low_frequency_factor
  )
  kept_P = xp.clip(kept_P, 0, 1)
  return frequency_P * (kept_P + (1 - kept_P) / scaling.factor)


def rotations(
  positions_BxS: jax.Array, frequency_P: np.ndarray | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of position x frequency, float32 [B, S, P], to 1e-6 at any int32 position.

  At positions of a million, a float32 product is wrong by a tenth of a radian. Here the frequency
  is an integer number of 2^-32 turns, so that the product wraps at whole turns without error; the
  small remainder of the frequency contributes a second term.
  """
  turns_P = frequency_P / (2 * math.pi)
  whole_P = turns_P * 2.0**32 // 1
  rest_P = jnp.asarray(turns_P - whole_P * 2.0**-32, jnp.float32)
  whole_P = jnp.asarray(whole_P.astype("uint32"))
  phase_BxSxP = positions_BxS.astype("uint32")[..., None] * whole_P[None, None]
  # A signed integer stands for half a turn back to half a turn ahead.
  turns_BxSxP = jax.lax.bitcast_convert_type(phase_BxSxP, jnp.int32).astype(jnp.float32) * 2.0**-32
  turns_BxSxP += positions_BxS.astype(jnp.float32)[..., None] * rest_P[None, None]
  angle_BxSxP = 2 * math.pi * turns_BxSxP
  return jnp.cos(angle_BxSxP), jnp.sin(angle_BxSxP)


def rotate(x_BxSxHxD: jax.Array, cosine_BxSxP: jax.Array, sine_BxSxP: jax.Array) -> jax.Array:
  """Rotates each pair by its angle, in float32; returns x's dtype."""
  first, second = jnp.split(x_BxSxHxD.astype(jnp.float32), 2, axis=-1)
  cosine, sine = cosine_BxSxP[:, :, None], sine_BxSxP[:, :, None]
  turned = jnp.concatenate(
    [first * cosine - second * sine, second * cosine + first * sine], axis=-1
  )
  return turned.astype(x_BxSxHxD.dtype)
