"""The VQGAN's sizes, its search for codes, and its straight-through gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.models import laptop_vqgan
from lwm.config.vqgan import VQGANConfig
from lwm.vision.vqgan import VQGAN, nearest_codes, straight_through

TINY = VQGANConfig(
  resolution=16,
  hidden_channels=8,
  channel_multipliers=(1, 2),
  num_res_blocks=1,
  latent_channels=8,
  codebook_size=16,
  codebook_width=4,
  norm_groups=4,
)


@pytest.mark.parametrize("config", [VQGANConfig(), laptop_vqgan()])
def test_frames_become_16_by_16_codes(config):
  side = config.resolution

  def sizes(pixels):
    model = VQGAN(config, rngs=nnx.Rngs(0))
    codes = model.encode(pixels)
    return model.latents(pixels), codes, model.decode(codes), model.codebook[...]

  latents, codes, pixels, codebook = jax.eval_shape(
    sizes, jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  )
  assert latents.shape == (2, 16, 16, config.codebook_width)
  assert codes.shape == (2, 16, 16) and codes.dtype == jnp.int32
  assert pixels.shape == (2, side, side, 3)
  assert codebook.shape == (config.codebook_size, config.codebook_width)


def test_lwm_size_is_lwms():
  config = VQGANConfig()
  assert (config.resolution, config.downsampling, config.grid) == (256, 16, 16)
  state = nnx.state(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0))))
  assert state["codebook"].shape == (8192, 64)
  # Counted by hand from LWM's `lwm/vqgan.py`: see `_parameters`.
  count = sum(leaf.size for leaf in jax.tree.leaves(state))
  assert count == _parameters((128, 256, 256, 512, 768), 2, 64, 8192, 64)


def _parameters(channels, num_res_blocks, latent, codes, code_width) -> int:
  """Parameters of LWM's VQGAN, from its description alone."""

  def convolution(inputs, outputs, side):
    return side * side * inputs * outputs + outputs

  def block(inputs, outputs):
    shortcut = convolution(inputs, outputs, 1) if inputs != outputs else 0
    both = convolution(inputs, outputs, 3) + convolution(outputs, outputs, 3)
    return 2 * inputs + 2 * outputs + both + shortcut

  top = channels[-1]
  total = codes * code_width
  total += convolution(latent, code_width, 1) + convolution(code_width, latent, 1)
  total += convolution(3, channels[0], 3) + convolution(channels[0], 3, 3)
  total += convolution(top, latent, 3) + convolution(latent, top, 3)
  total += 2 * top + 2 * channels[0] + 4 * block(top, top)
  before = channels[0]
  for width in channels:
    total += block(before, width) + (num_res_blocks - 1) * block(width, width)
    before = width
  for width in reversed(channels):
    total += block(before, width) + num_res_blocks * block(width, width)
    before = width
  # A convolution after each level of the encoder but the last, and of the decoder likewise.
  total += sum(convolution(width, width, 3) for width in channels[:-1])
  return total + sum(convolution(width, width, 3) for width in channels[1:])


def test_settings_that_do_not_go_together_are_named():
  with pytest.raises(ValueError, match="resolution=100"):
    VQGANConfig(resolution=100).validate()
  with pytest.raises(ValueError, match="norm_groups=48"):
    VQGANConfig(norm_groups=48).validate()


@pytest.mark.parametrize(
  "setting, value",
  [
    ("codebook_size", 0),
    ("norm_groups", 0),
    ("num_res_blocks", -1),
    ("channel_multipliers", ()),
    ("channel_multipliers", (1, 0.5)),
    ("channel_multipliers", (1, "x")),
  ],
)
def test_sizes_are_checked(setting, value):
  with pytest.raises(ValueError, match=f"{setting}=.*whole numbers"):
    VQGANConfig(**{setting: value}).validate()
  VQGANConfig(num_res_blocks=0).validate()


def test_nearest_codes_are_the_nearest():
  random = np.random.default_rng(0)
  latents = random.normal(size=(2, 3, 3, 4)).astype(np.float32)
  codebook = random.normal(size=(7, 4)).astype(np.float32)
  distances = np.square(latents[..., None, :] - codebook).sum(-1)
  np.testing.assert_array_equal(nearest_codes(latents, codebook), distances.argmin(-1))


@pytest.mark.slow
def test_search_in_blocks_finds_the_lowest_of_equal_codes():
  """Whole numbers, so that distances are exact; many codes are equal, across blocks too."""
  random = np.random.default_rng(0)
  latents = random.integers(-3, 4, (2, 80, 60, 2)).astype(np.float32)
  codebook = random.integers(-4, 5, (2500, 2)).astype(np.float32)
  # The first block of codes has neighbours for a quarter of the latents alone.
  codebook[:1200] = np.abs(codebook[:1200])
  distances = np.square(latents.reshape(-1, 1, 2) - codebook).sum(-1)
  expected = distances.argmin(-1)
  assert (np.diff(np.sort(distances, axis=-1)[:, :2]) == 0).mean() > 0.9
  assert (expected >= 1024).any()
  np.testing.assert_array_equal(nearest_codes(latents, codebook), expected.reshape(2, 80, 60))


def peak_bytes(function, *arguments) -> int:
  """Memory of a compiled program: arguments, results, and what it uses in between."""
  memory = function.lower(*arguments).compile().memory_analysis()
  return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def test_memory_of_the_search():
  """131072 latents, of 512 frames, to 16384 codes: 8 GiB as one matrix."""
  latents = jax.ShapeDtypeStruct((512, 16, 16, 64), jnp.float32)
  codebook = jax.ShapeDtypeStruct((16384, 64), jnp.float32)
  inputs = 4 * 64 * (512 * 256 + 16384)
  assert peak_bytes(jax.jit(nearest_codes), latents, codebook) - inputs < 2**26


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
  latents = jnp.array([[[[1.0, 2.0]]]])
  quantized = jnp.array([[[[5.0, 5.0]]]])
  weights = jnp.array([3.0, 4.0])
  value, gradients = jax.value_and_grad(
    lambda z, q: (straight_through(z, q) * weights).sum(), argnums=(0, 1)
  )(latents, quantized)
  assert value == 35.0
  np.testing.assert_array_equal(gradients[0][0, 0, 0], weights)
  np.testing.assert_array_equal(gradients[1], 0.0)
