"""A step of VQGAN training: its gradients, what it changes without them, and its evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lwm.config.vqgan import VQGANConfig, VQGANLossConfig
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.vision.codec import Codec, save_vqgan, to_pixels
from lwm.vision.discriminator import hinge_loss
from lwm.vision.objective import VQGANObjective
from lwm.vision.perceptual import feature_distance
from lwm.vision.similarity import structural_similarity
from lwm.vision.vqgan import nearest_codes

TINY = VQGANConfig(
  resolution=16,
  hidden_channels=8,
  channel_multipliers=(1, 2),
  num_res_blocks=0,
  latent_channels=8,
  codebook_size=16,
  codebook_width=4,
  norm_groups=4,
)
LOSSES = VQGANLossConfig(
  continuous_steps=3,
  perceptual_weight=0.3,
  adversarial_weight=0.5,
  adversarial_start=6,
  discriminator_channels=8,
  discriminator_layers=1,
  average_decay=0.9,
)
OBJECTIVE = VQGANObjective(TINY, LOSSES)
BATCH = PartitionSpec(("data", "fsdp"))


def stored(leaf):
  """In shards along the last axis where it divides over four devices."""
  is_divided = len(leaf.shape) > 1 and leaf.shape[-1] % 4 == 0
  return PartitionSpec(*[None] * (len(leaf.shape) - 1), "fsdp") if is_divided else PartitionSpec()


class Run:
  """The compiled step and evaluation on some devices; results are NumPy arrays."""

  def __init__(self, devices):
    mesh = MeshConfig(data=2, fsdp=4) if devices == 8 else MeshConfig()
    self.mesh = make_mesh(mesh, jax.devices()[:devices])
    self._step, self._evaluate = jax.jit(OBJECTIVE.gradients), jax.jit(OBJECTIVE.evaluate)

  def _place(self, params, frames):
    params = jax.tree.map(
      lambda leaf: jax.device_put(leaf, NamedSharding(self.mesh, stored(leaf))), params
    )
    return params, jax.device_put(frames, NamedSharding(self.mesh, BATCH))

  def step(self, params, frames, step):
    with jax.set_mesh(self.mesh):
      placed = self._place(params, frames)
      results = self._step(*placed, jnp.int32(step), jax.random.key(1))
      gradients, frozen, _ = results
      if self.mesh.size == 8:
        kernel = placed[0]["generator"]["decoder"]["stem"]["kernel"]
        assert not kernel.sharding.is_fully_replicated
        assert gradients["generator"]["decoder"]["stem"]["kernel"].sharding == kernel.sharding
        assert frozen["codebook"]["sums"].sharding == placed[0]["codebook"]["sums"].sharding
      return jax.tree.map(np.asarray, results)

  def evaluate(self, params, frames):
    with jax.set_mesh(self.mesh):
      return jax.tree.map(np.asarray, self._evaluate(*self._place(params, frames)))


@pytest.fixture(scope="module")
def frames():
  return np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def params():
  params = jax.jit(OBJECTIVE.init)(jax.random.key(0))
  # As in the middle of training: codes that the latents choose, and averages that lag behind.
  params["codebook"] = {
    "counts": jnp.full(16, 30.0),
    "sums": 15.0 * jax.random.normal(jax.random.key(1), (16, 4)),
  }
  params["average"] = jax.tree.map(lambda leaf: 0.9 * leaf + 0.01, params["average"])
  return jax.tree.map(np.asarray, params)


@pytest.fixture(scope="module")
def alone():
  return Run(1)


@pytest.fixture(scope="module")
def late(alone, params, frames):
  """A step with everything on."""
  return alone.step(params, frames, 6)


def assert_close(one, other, rtol=2e-4, atol=1e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, other)


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(params, frames, late, alone):
  together = Run(8)
  assert_close(together.step(params, frames, 6), late)
  assert_close(together.evaluate(params, frames), alone.evaluate(params, frames))


@pytest.mark.slow
def test_gradients_are_those_of_the_weighted_losses(params, frames, late):
  """The adaptive weight by `jax.grad` of each loss, then the gradients of their sum."""
  pixels = to_pixels(frames, TINY.pixel_range)
  table = jnp.asarray(params["codebook"]["sums"] / params["codebook"]["counts"][:, None])
  judge = OBJECTIVE._discriminator(params["discriminator"])

  def losses(generator):
    model = OBJECTIVE._model(generator)
    latents = model.latents(pixels)
    codes = nearest_codes(latents, table)
    fixed = jax.lax.stop_gradient
    output = model.reconstruct(latents + fixed(table[codes] - latents))
    error = output - pixels
    features = judge.features(output), judge.features(pixels)
    return {
      "pixel": jnp.abs(error).mean() + jnp.square(error).mean(),
      "perceptual": feature_distance(*features, [None] * 2),
      "commitment": jnp.square(latents - table[codes]).mean(),
      "adversarial": -judge(output).mean(),
    }, output

  def weighted(generator, weights):
    parts, _ = losses(generator)
    return sum(weights[name] * parts[name] for name in parts)

  @jax.jit
  def expected(generator):
    gradient = jax.grad(weighted)
    seen = {"pixel": 1.0, "perceptual": 0.3, "commitment": 0.0, "adversarial": 0.0}
    norms = [
      jnp.linalg.norm(gradient(generator, weights)["decoder"]["head"]["kernel"])
      for weights in (seen, dict.fromkeys(seen, 0.0) | {"adversarial": 1.0})
    ]
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    total = seen | {"commitment": 0.25, "adversarial": weight}
    parts, output = losses(generator)

    def judged(discriminator):
      network = OBJECTIVE._discriminator(discriminator)
      return hinge_loss(network(pixels), network(output))

    parts["discriminator"], of_judge = jax.value_and_grad(judged)(params["discriminator"])
    return {"generator": gradient(generator, total), "discriminator": of_judge}, weight, parts

  gradients, weight, parts = expected(params["generator"])
  assert_close(late[0], gradients, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(late[2]["adversarial_weight"], weight, rtol=1e-3)
  for name, value in parts.items():
    np.testing.assert_allclose(late[2][name], value, rtol=1e-4)


def test_what_changes_without_gradients(params, late):
  _, frozen, metrics = late
  assert set(frozen) == {"codebook", "average"}
  # 0.9 would be slower than the average of the first steps, 7 / 16.
  assert_close(
    frozen["average"],
    {
      "generator": jax.tree.map(
        lambda old, now: 7 / 16 * old + 9 / 16 * now,
        params["average"]["generator"],
        params["generator"],
      )
    },
  )
  assert 0 < metrics["usage"] <= 1 and 1 < metrics["codebook_perplexity"] <= 16
  trained = [name.removesuffix(".*") for name in OBJECTIVE.trained]
  assert set(trained) == set(late[0]) and set(trained) | set(frozen) == set(params)


def test_the_first_steps(alone, params, frames, late):
  """Without quantization, then without the discriminator: the same program, other steps."""
  continuous, quantized = (alone.step(params, frames, step) for step in (2, 5))
  assert continuous[2]["commitment"] == 0 and quantized[2]["commitment"] > 0
  assert continuous[2]["pixel"] != quantized[2]["pixel"] == late[2]["pixel"]
  # 512 latents, 16 codes: all are drawn from the batch until the decoder sees them.
  np.testing.assert_array_equal(continuous[1]["codebook"]["counts"], 32.0)
  assert_close(quantized[1]["codebook"], late[1]["codebook"])
  for early in (continuous, quantized):
    assert early[2]["adversarial_weight"] == 0 < late[2]["adversarial_weight"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(early[0]["discriminator"]))
  assert all(leaf.any() for leaf in jax.tree.leaves(late[0]))


def test_what_is_evaluated_is_what_is_saved(alone, params, frames, tmp_path):
  sums = alone.evaluate(params, frames)
  save_vqgan(tmp_path / "vqgan.npz", TINY, OBJECTIVE.variables(params))
  codec = Codec(tmp_path / "vqgan.npz", batch_size=8)
  codes = codec.encode(frames)
  reconstruction = codec.decode(codes)
  assert sums["frames"] == 8
  np.testing.assert_array_equal(sums["wins"], np.bincount(codes.reshape(-1), minlength=16))
  error = np.square(reconstruction.astype(np.float64) - frames).mean((1, 2, 3)).sum()
  np.testing.assert_allclose(sums["squared_error"], error, rtol=1e-3)
  ssim = structural_similarity(jnp.asarray(reconstruction), jnp.asarray(frames)).sum()
  np.testing.assert_allclose(sums["ssim"], ssim, rtol=1e-3)
  # The averages are saved, not the parameters.
  np.testing.assert_array_equal(
    codec.state["encoder"]["stem"]["kernel"][...],
    params["average"]["generator"]["encoder"]["stem"]["kernel"],
  )


def test_structural_similarity_is_the_definition():
  random = np.random.default_rng(0)
  ours = random.integers(0, 256, (2, 13, 12, 3), dtype=np.uint8)
  theirs = (0.7 * ours + 0.3 * random.integers(0, 256, ours.shape)).astype(np.uint8)
  offsets = np.arange(11) - 5
  window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / 4.5)
  window = (window / window.sum())[..., None]
  values = []
  for top in range(3):
    for left in range(2):
      x, y = (
        frames[:, top : top + 11, left : left + 11].astype(np.float64) for frames in (ours, theirs)
      )
      mean = functools.partial(lambda array: (window * array).sum((1, 2)))
      mx, my = mean(x), mean(y)
      vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
      values.append(
        (2 * mx * my + 6.5025)
        * (2 * cov + 58.5225)
        / ((mx**2 + my**2 + 6.5025) * (vx + vy + 58.5225))
      )
  expected = np.mean(values, axis=0).mean(-1)
  assert (expected > 0.1).all() and (expected < 0.95).all()
  np.testing.assert_allclose(structural_similarity(ours, theirs), expected, rtol=1e-4)
