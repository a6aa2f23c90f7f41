"""The VQGAN's sizes, its straight-through gradient, and its training on a few frames."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.models import laptop_vqgan
from lwm.config.vqgan import VQGANConfig, VQGANTrainingConfig
from lwm.errors import UserError
from lwm.vision import train as vqgan_train
from lwm.vision.vqgan import VQGAN, Codebook, nearest_codes, straight_through

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


def moving_square(num_frames: int, resolution: int) -> np.ndarray:
  """A bright square that moves over a dark gradient."""
  frames = np.zeros((num_frames, resolution, resolution, 3), np.uint8)
  frames[..., 2] = np.linspace(0, 120, resolution, dtype=np.uint8)
  for i, frame in enumerate(frames):
    begin = i % (resolution // 2)
    frame[begin : begin + resolution // 4, begin : begin + resolution // 4] = (250, 200, 30)
  return frames


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
  with pytest.raises(ValueError, match="warmup_steps=20 .* steps=10"):
    VQGANTrainingConfig(steps=10, continuous_steps=0).validate()


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


@pytest.mark.parametrize(
  "setting, value",
  [
    ("batch_size", 0),
    ("peak_learning_rate", float("nan")),
    ("commitment_weight", -1.0),
    ("codebook_decay", 1.0),
    ("restart_share", -0.1),
    ("steps", 0),
  ],
)
def test_training_settings_are_checked(setting, value):
  with pytest.raises(ValueError, match=f"{setting}="):
    VQGANTrainingConfig(**{setting: value}).validate()


def test_more_codes_than_the_frames_have_latents():
  frames = moving_square(3, TINY.resolution)
  config = dataclasses.replace(TINY, codebook_size=3 * TINY.grid**2 + 1)
  with pytest.raises(UserError, match="codebook_size=193 needs at least 4 frames .* there are 3"):
    vqgan_train.train(frames, config, VQGANTrainingConfig(), seed=0)


def test_nearest_codes_are_the_nearest():
  random = np.random.default_rng(0)
  latents = random.normal(size=(2, 3, 3, 4)).astype(np.float32)
  codebook = random.normal(size=(7, 4)).astype(np.float32)
  distances = np.square(latents[..., None, :] - codebook).sum(-1)
  np.testing.assert_array_equal(nearest_codes(latents, codebook), distances.argmin(-1))


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


@pytest.fixture(scope="module")
def lwm_size():
  """The programs of LWM's sizes, 8192 codes at 256 pixels; arguments as shapes alone."""
  programs = vqgan_train.Programs(VQGANConfig(), VQGANTrainingConfig())
  state = jax.eval_shape(lambda: programs.start(0))
  frames = jax.ShapeDtypeStruct((8, 256, 256, 3), jnp.uint8)
  return programs, state, frames, jax.eval_shape(lambda: jax.random.key(0))


def test_memory_of_the_search():
  """131072 latents, of 512 frames, to 16384 codes: 8 GiB as one matrix."""
  latents = jax.ShapeDtypeStruct((512, 16, 16, 64), jnp.float32)
  codebook = jax.ShapeDtypeStruct((16384, 64), jnp.float32)
  inputs = 4 * 64 * (512 * 256 + 16384)
  assert peak_bytes(jax.jit(nearest_codes), latents, codebook) - inputs < 2**26


def test_memory_of_the_first_codebook_at_lwms_size(lwm_size):
  """1.8 GiB, mostly parameters and optimizer state, to encode a batch, 0.2 GiB more to cluster."""
  programs, state, frames, key = lwm_size
  assert peak_bytes(programs.latents, state.params, frames) < 1.2 * 2**30
  latents = jax.ShapeDtypeStruct((64 * 8192, 64), jnp.float32)
  state = state._replace(params=None, optimizer=None)
  assert peak_bytes(programs.first_codebook, state, latents, key) < 0.25 * 2**30


@pytest.mark.slow
def test_memory_of_a_step_at_lwms_size(lwm_size):
  """23.9 GiB for 8 frames: activations of the convolutions, and next to nothing for 8192 codes."""
  programs, state, frames, key = lwm_size
  quantize = jax.ShapeDtypeStruct((), jnp.bool_)
  assert peak_bytes(programs.step, state, frames, quantize, key) < 24.5 * 2**30


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


def test_reconstruction_reaches_the_encoder_through_the_codes_but_not_the_codebook():
  graph, params, codebook = nnx.split(VQGAN(TINY, rngs=nnx.Rngs(0)), nnx.Param, Codebook)
  pixels = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1.0)

  @jax.jit
  def gradients(params, codebook):
    def reconstruction(params, codebook):
      return vqgan_train.losses(nnx.merge(graph, params, codebook), pixels, jnp.array(True))[0]

    return jax.grad(reconstruction, argnums=(0, 1))(params, codebook)

  of_params, of_codebook = gradients(params, codebook)
  for name in ("encoder", "quant_conv", "post_quant_conv", "decoder"):
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params[name])), name
  assert jnp.abs(of_codebook["codebook"][...]).max() == 0


def test_clusters_find_separate_groups():
  centres = np.array([[0, 0], [10, 0], [0, 10]], np.float32)
  random = np.random.default_rng(0)
  latents = centres[np.repeat(np.arange(3), [20, 30, 50])] + random.normal(size=(100, 2)) * 0.1
  wins, found = vqgan_train.cluster(jnp.asarray(latents, jnp.float32), 8, jax.random.key(0))
  assert wins.sum() == 100
  nearest = np.square(np.asarray(found)[:, None] - centres).sum(-1).argmin(-1)
  for centre, size in enumerate([20, 30, 50]):
    assert wins[nearest == centre].sum() == size
  assert np.square(np.asarray(found)[:, None] - centres).sum(-1).min(-1).max() < 0.5


@pytest.mark.slow
def test_training_lowers_the_error_uses_codes_and_repeats_itself():
  frames = moving_square(16, TINY.resolution)
  training = VQGANTrainingConfig(
    steps=60, continuous_steps=20, batch_size=8, peak_learning_rate=5e-3, warmup_steps=5
  )
  reconstruction, used = [], []

  def report(step, metrics):
    reconstruction.append(float(metrics.reconstruction))
    used.append(int((metrics.wins_V > 0).sum()))

  first = vqgan_train.train(frames, TINY, training, seed=0, report=report)
  second = vqgan_train.train(frames, TINY, training, seed=0)
  assert np.mean(reconstruction[-5:]) < 0.5 * np.mean(reconstruction[:5])
  assert used[-1] >= 8
  for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_array_equal(one, other)
