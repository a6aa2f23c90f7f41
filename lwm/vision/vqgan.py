"""The VQGAN that turns frames into codes and back: MUSE's, as LWM uses it (arXiv 2402.08268).

The architecture is LWM's. The encoder is a 3x3 stem, levels of residual blocks (GroupNorm, swish,
3x3 convolution, twice) with strided convolutions between them, and two blocks at the end without
attention. The decoder mirrors it with nearest-neighbour upsampling. The codebook is between 1x1
convolutions. `lwm.vision.objective` describes the training.

Legend: B frames; H, W height and width in pixels; h, w height and width of the grid; C channels;
L latents, in a block of the search too; V codes, in a block of the search too; E codebook width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.varying import vary_trees_alike
from lwm.config.vqgan import VQGANConfig

# Distances of one block of the nearest-code search: 32 MiB in float32.
_LATENTS_PER_BLOCK = 8192
_CODES_PER_BLOCK = 1024


class Codebook(nnx.Variable):
  """The code vectors. A separate type, because moving averages set them and gradients do not."""


class ResidualBlock(nnx.Module):
  """Two pre-activated 3x3 convolutions and a shortcut, which is 1x1 if the channels change."""

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
  """Pixels in the config's range to latents on the grid."""

  def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
    channels = config.hidden_channels
    groups = config.norm_groups
    self.stem = nnx.Conv(3, channels, (3, 3), rngs=rngs)
    layers: list[nnx.Module] = []
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
  """Latents on the grid to pixels, not clipped; levels have one block more than the encoder's."""

  def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
    channels = config.level_channels[-1]
    groups = config.norm_groups
    self.stem = nnx.Conv(config.latent_channels, channels, (3, 3), rngs=rngs)
    layers: list[nnx.Module] = [
      ResidualBlock(channels, channels, groups, rngs=rngs) for _ in range(2)
    ]
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
    return self.head(self.features(latents_BxhxwxC))

  def features(self, latents_BxhxwxC: jax.Array) -> jax.Array:
    """What the last layer turns into pixels, [B, H, W, C]."""
    hidden = self.stem(latents_BxhxwxC)
    for layer in self.layers:
      hidden = layer(hidden)
    return jax.nn.silu(self.norm(hidden))


def nearest_codes(latents_BxhxwxE: jax.Array, codebook_VxE: jax.Array) -> jax.Array:
  """Index of the code vector nearest to each latent in Euclidean distance; int32 [B, h, w].

  The lowest index wins a tie. Distances exist for one block of latents and codes at a time, so the
  memory of the search does not grow with their numbers. No gradient passes.
  """
  *grid, width = latents_BxhxwxE.shape
  latents_LxE = jax.lax.stop_gradient(latents_BxhxwxE).reshape(-1, width)
  codebook_VxE = jax.lax.stop_gradient(codebook_VxE)
  codes_per_block = min(len(codebook_VxE), _CODES_PER_BLOCK)
  code_blocks = (
    jnp.arange(0, len(codebook_VxE), codes_per_block, dtype=jnp.int32),
    blocks_of(codebook_VxE, codes_per_block),
    # The padding is infinitely far away.
    blocks_of(jnp.square(codebook_VxE).sum(-1), codes_per_block, jnp.inf),
  )

  def nearest(latents_LxE: jax.Array) -> jax.Array:
    def search(best, block):
      distances_L, codes_L = best
      first, vectors_VxE, squares_V = block
      # The latent's own square is the same for every code, so it is left out.
      block_LxV = squares_V - 2.0 * jnp.einsum("le,ve->lv", latents_LxE, vectors_VxE)
      closest_L = block_LxV.min(-1)
      closer_L = closest_L < distances_L
      block_codes_L = first + jnp.argmin(block_LxV, axis=-1).astype(jnp.int32)
      best = (
        jnp.where(closer_L, closest_L, distances_L),
        jnp.where(closer_L, block_codes_L, codes_L),
      )
      return best, None

    start = jnp.full(len(latents_LxE), jnp.inf), jnp.zeros(len(latents_LxE), jnp.int32)
    start, blocks, _ = vary_trees_alike(start, code_blocks, latents_LxE)
    (_, codes_L), _ = jax.lax.scan(search, start, blocks)
    return codes_L

  latent_blocks = blocks_of(latents_LxE, min(len(latents_LxE), _LATENTS_PER_BLOCK))
  codes_L = jax.lax.map(nearest, latent_blocks).reshape(-1)[: len(latents_LxE)]
  return codes_L.reshape(grid)


def blocks_of(array: jax.Array, size: int, padding: float = 0.0) -> jax.Array:
  """Splits the first axis into [blocks, size], with the last block padded."""
  missing = -len(array) % size
  padded = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1), constant_values=padding)
  return padded.reshape(-1, size, *array.shape[1:])


def straight_through(latents_BxhxwxE: jax.Array, quantized_BxhxwxE: jax.Array) -> jax.Array:
  """The quantized value with the gradient of the latents (van den Oord et al., 1711.00937)."""
  return latents_BxhxwxE + jax.lax.stop_gradient(quantized_BxhxwxE - latents_BxhxwxE)


class VQGAN(nnx.Module):
  """Encoder, codebook, decoder.

  Pixels are float32 in the config's pixel_range, codes int32 below its codebook_size.
  """

  def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
    config.validate()
    self.pixel_range = config.pixel_range
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
    """Pixels [B, H, W, 3], clipped to the pixel range."""
    return jnp.clip(self.reconstruct(self.codebook[...][codes_Bxhxw]), *self.pixel_range)
