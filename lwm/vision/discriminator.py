"""The patch discriminator: a small convolutional network that judges overlapping patches of frames.

PatchGAN (Isola et al., arXiv 1611.07004) with the hinge loss, as VQGAN uses it (arXiv 2012.09841).
Group norm stands in for the original's batch norm: a frame is judged independently of its batch.

Legend: B frames; H, W height and width in pixels; h, w of the grid of patches; C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

_SLOPE = 0.2
# Channels double with every layer up to this multiple of the first.
_MOST_CHANNELS = 8


class Discriminator(nnx.Module):
  """Convolutions of 4x4 pixels: some with stride 2, one more with stride 1, and the logits."""

  def __init__(self, channels: int, num_layers: int, *, rngs: nnx.Rngs):
    """
    Args:
      channels: after the first convolution.
      num_layers: convolutions with stride 2; a patch of 3 layers is 70 pixels wide.
      rngs: of the parameters.
    """
    widths = [channels * min(2**layer, _MOST_CHANNELS) for layer in range(num_layers + 1)]
    self.stem = nnx.Conv(3, widths[0], (4, 4), strides=2, rngs=rngs)
    convolutions, norms = [], []
    for layer, (inputs, outputs) in enumerate(zip(widths, widths[1:]), start=1):
      strides = 2 if layer < num_layers else 1
      convolutions.append(
        nnx.Conv(inputs, outputs, (4, 4), strides=strides, use_bias=False, rngs=rngs)
      )
      norms.append(nnx.GroupNorm(outputs, num_groups=_groups(outputs), rngs=rngs))
    self.convolutions, self.norms = nnx.List(convolutions), nnx.List(norms)
    self.head = nnx.Conv(widths[-1], 1, (4, 4), rngs=rngs)

  def __call__(self, pixels_BxHxWx3: jax.Array) -> jax.Array:
    """Logits [B, h, w]; above 0: the patch looks real."""
    return self.head(self.features(pixels_BxHxWx3)[-1])[..., 0]

  def features(self, pixels_BxHxWx3: jax.Array) -> list[jax.Array]:
    """The activations of every layer before the logits, [B, H, W, C] of falling sizes."""
    hidden = jax.nn.leaky_relu(self.stem(pixels_BxHxWx3), _SLOPE)
    features = [hidden]
    for convolution, norm in zip(self.convolutions, self.norms, strict=True):
      hidden = jax.nn.leaky_relu(norm(convolution(hidden)), _SLOPE)
      features.append(hidden)
    return features


def _groups(channels: int) -> int:
  """32 groups, or fewer where they do not divide the channels."""
  return max(groups for groups in range(1, 33) if channels % groups == 0)


def hinge_loss(real_Bxhxw: jax.Array, fake_Bxhxw: jax.Array) -> jax.Array:
  """The discriminator's loss of logits of frames and of reconstructions; a scalar."""
  real, fake = jax.nn.relu(1.0 - real_Bxhxw).mean(), jax.nn.relu(1.0 + fake_Bxhxw).mean()
  return 0.5 * (real + fake)


def adaptive_weight(pixel_gradient: jax.Array, adversarial_gradient: jax.Array) -> jax.Array:
  """The weight that makes both losses pull equally at the decoder's last layer (2012.09841, eq. 7).

  Args:
    pixel_gradient: of the pixel and perceptual losses by the last layer's kernel.
    adversarial_gradient: of the adversarial loss by the same kernel.
  """
  ratio = jnp.linalg.norm(pixel_gradient) / (jnp.linalg.norm(adversarial_gradient) + 1e-4)
  return jnp.clip(ratio, 0.0, 1e4)
