"""The VQGAN that turns frames into codes and back: MUSE's, as LWM uses it (arXiv 2402.08268).

The architecture is LWM's: a 3x3 stem, residual blocks of [GroupNorm, swish, 3x3 convolution] twice
at each level, strided convolutions down, two blocks in the middle without attention, 1x1
convolutions around the codebook, and the mirror of it with nearest-neighbour upsampling. How it is
trained here, and what that leaves out, stands in `lwm.vision.train`.

Legend: B frames, H height, W width in pixels; h, w height and width of the grid; C channels of the
tensor at hand; V codes; E codebook width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lwm.config.vqgan import VQGANConfig


class Codebook(nnx.Variable):
  """The code vectors: a type of their own, as moving averages set them and gradients do not."""


class ResidualBlock(nnx.Module):
  """Two pre-activated 3x3 convolutions beside a shortcut, which is 1x1 if the channels change."""

  def __init__(self, in_channels: int, out_channels: int, groups: int, *, rngs: nnx.Rngs):
    self.norm1 = nnx.GroupNorm(in_channels, groups, rngs=rngs)
    self.conv1 = nnx.Conv(in_channels, out_channels, (3, 3), rngs=rngs)
    self.norm2 = nnx.GroupNorm(out_channels, groups, rngs=rngs)
    self.conv2 = nnx.Conv(out_channels, out_channels, (3, 3), rngs=rngs)
    self.shortcut = (
      nnx.Conv(in_channels, out_channels, (1, 1), rngs=rngs)
      if in_channels != out_channels
      else nnx.data(None)
    )

  def __call__(self, hidden_BxHxWxC: jax.Array) -> jax.Array:
    residual_BxHxWxC = self.conv1(jax.nn.silu(self.norm1(hidden_BxHxWxC)))
    residual_BxHxWxC = self.conv2(jax.nn.silu(self.norm2(residual_BxHxWxC)))
    if self.shortcut is not None:
      hidden_BxHxWxC = self.shortcut(hidden_BxHxWxC)
    return hidden_BxHxWxC + residual_BxHxWxC


class Downsample(nnx.Module):
  """Halves both sides by a strided 3x3 convolution, padded at the bottom and right only."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv = nnx.Conv(channels, channels, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs)

  def __call__(self, hidden_BxHxWxC: jax.Array) -> jax.Array:
    return self.conv(hidden_BxHxWxC)


class Upsample(nnx.Module):
  """Doubles both sides by repeating pixels, then a 3x3 convolution."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv = nnx.Conv(channels, channels, (3, 3), rngs=rngs)

  def __call__(self, hidden_BxHxWxC: jax.Array) -> jax.Array:
    return self.conv(hidden_BxHxWxC.repeat(2, axis=1).repeat(2, axis=2))


class Encoder(nnx.Module):
  """Pixels in [-1, 1] to latents on the grid."""

  def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
    channels = config.hidden_channels
    groups = config.norm_groups
    self.stem = nnx.Conv(3, channels, (3, 3), rngs=rngs)
    layers = []
    for level, level_channels in enumerate(config.level_channels):
      for _ in range(config.num_res_blocks):
        layers.append(ResidualBlock(channels, level_channels, groups, rngs=rngs))
        channels = level_channels
      if level < len(config.level_channels) - 1:
        layers.append(Downsample(channels, rngs=rngs))
    layers += [ResidualBlock(channels, channels, groups, rngs=rngs) for _ in range(2)]
    self.layers = nnx.List(layers)
    self.norm = nnx.GroupNorm(channels, groups, rngs=rngs)
    self.head = nnx.Conv(channels, config.latent_channels, (3, 3), rngs=rngs)

  def __call__(self, pixels_BxHxWx3: jax.Array) -> jax.Array:
    hidden = self.stem(pixels_BxHxWx3)
    for layer in self.layers:
      hidden = layer(hidden)
    return self.head(jax.nn.silu(self.norm(hidden)))


class Decoder(nnx.Module):
  """Latents on the grid to pixels, about [-1, 1]; a level has one block more than the encoder's."""

  def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
    channels = config.level_channels[-1]
    groups = config.norm_groups
    self.stem = nnx.Conv(config.latent_channels, channels, (3, 3), rngs=rngs)
    layers = [ResidualBlock(channels, channels, groups, rngs=rngs) for _ in range(2)]
    for level, level_channels in reversed(list(enumerate(config.level_channels))):
      for _ in range(config.num_res_blocks + 1):
        layers.append(ResidualBlock(channels, level_channels, groups, rngs=rngs))
        channels = level_channels
      if level > 0:
        layers.append(Upsample(channels, rngs=rngs))
    self.layers = nnx.List(layers)
    self.norm = nnx.GroupNorm(channels, groups, rngs=rngs)
    self.head = nnx.Conv(channels, 3, (3, 3), rngs=rngs)

  def __call__(self, latents_BxhxwxC: jax.Array) -> jax.Array:
    hidden = self.stem(latents_BxhxwxC)
    for layer in self.layers:
      hidden = layer(hidden)
    return self.head(jax.nn.silu(self.norm(hidden)))


def nearest_codes(latents_BxhxwxE: jax.Array, codebook_VxE: jax.Array) -> jax.Array:
  """Index of the code vector nearest to each latent in Euclidean distance; int32 [B, h, w]."""
  # The latent's own square is the same for every code, so it is left out.
  products_BxhxwxV = jnp.einsum("bhwe,ve->bhwv", latents_BxhxwxE, codebook_VxE)
  squares_V = jnp.square(codebook_VxE).sum(-1)
  return jnp.argmin(squares_V - 2.0 * products_BxhxwxV, axis=-1).astype(jnp.int32)


def straight_through(latents_BxhxwxE: jax.Array, quantized_BxhxwxE: jax.Array) -> jax.Array:
  """The quantized value with the gradient of the latents (van den Oord et al., 1711.00937)."""
  return latents_BxhxwxE + jax.lax.stop_gradient(quantized_BxhxwxE - latents_BxhxwxE)


class VQGAN(nnx.Module):
  """Encoder, codebook, decoder. Pixels are float32 in [-1, 1], codes int32 below codebook_size."""

  def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
    config.validate()
    self.encoder = Encoder(config, rngs=rngs)
    self.quant_conv = nnx.Conv(config.latent_channels, config.codebook_width, (1, 1), rngs=rngs)
    scale = 1.0 / config.codebook_size
    self.codebook = Codebook(
      jax.random.uniform(
        rngs.params(), (config.codebook_size, config.codebook_width), jnp.float32, -scale, scale
      )
    )
    self.post_quant_conv = nnx.Conv(
      config.codebook_width, config.latent_channels, (1, 1), rngs=rngs
    )
    self.decoder = Decoder(config, rngs=rngs)

  def latents(self, pixels_BxHxWx3: jax.Array) -> jax.Array:
    """Latents before quantization, [B, h, w, E]."""
    return self.quant_conv(self.encoder(pixels_BxHxWx3))

  def reconstruct(self, latents_BxhxwxE: jax.Array) -> jax.Array:
    """Pixels [B, H, W, 3] of latents, quantized or not; not clipped."""
    return self.decoder(self.post_quant_conv(latents_BxhxwxE))

  def encode(self, pixels_BxHxWx3: jax.Array) -> jax.Array:
    """Codes [B, h, w]."""
    return nearest_codes(self.latents(pixels_BxHxWx3), self.codebook[...])

  def decode(self, codes_Bxhxw: jax.Array) -> jax.Array:
    """Pixels [B, H, W, 3], clipped to [-1, 1]."""
    return jnp.clip(self.reconstruct(self.codebook[...][codes_Bxhxw]), -1.0, 1.0)
