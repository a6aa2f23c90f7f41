"""Structural similarity of frames.

Legend: B frames; H, W height and width in pixels.
"""

import jax
import jax.numpy as jnp
import numpy as np

_WINDOW = 11
_SIGMA = 1.5
_PEAK = 255.0


def structural_similarity(ours_BxHxWx3: jax.Array, theirs_BxHxWx3: jax.Array) -> jax.Array:
  """SSIM of each pair of frames, float32 [B] (Wang et al., IEEE TIP 13(4), 2004).

  The window is a Gaussian of 11x11 pixels that lies inside the frame, and each colour counts alike.

  Args:
    ours_BxHxWx3: uint8, at least 11 pixels high and wide.
    theirs_BxHxWx3: the same of the other frames.
  """
  x, y = (frames.astype(jnp.float32) for frames in (ours_BxHxWx3, theirs_BxHxWx3))
  mean_x, mean_y = _blur(x), _blur(y)
  variance_x = _blur(x * x) - mean_x * mean_x
  variance_y = _blur(y * y) - mean_y * mean_y
  covariance = _blur(x * y) - mean_x * mean_y
  c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
  luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
  structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
  return (luminance * structure).mean((1, 2, 3))


def _blur(images_BxHxWx3: jax.Array) -> jax.Array:
  """Weighted means over the window; the sides shrink by 10 pixels."""
  offsets = np.arange(_WINDOW) - _WINDOW // 2
  weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
  weights = (weights / weights.sum()).astype(np.float32)
  for axis in (1, 2):
    size = images_BxHxWx3.shape[axis] - _WINDOW + 1
    images_BxHxWx3 = sum(
      weight * jax.lax.slice_in_dim(images_BxHxWx3, first, first + size, axis=axis)
      for first, weight in enumerate(weights)
    )
  return images_BxHxWx3
