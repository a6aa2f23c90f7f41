"""Adam with moments in fewer bytes or in host memory, against optax's Adam in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lwm.config.experiment import OptimizerConfig, Stage
from lwm.program import moments
from lwm.program.optimizer import adamw
from lwm.program.state import abstract_state
from lwm.program.trainable import Trainable

BETAS = 0.9, 0.95, 1e-8


def rows(shape, seed=0):
  """Values over seven orders of magnitude, some zeros among them, and one row of zeros."""
  random = np.random.default_rng(seed)
  array = random.standard_normal(shape) * 10.0 ** random.uniform(-4, 3, shape)
  array[random.random(shape) < 0.1] = 0
  array[0] = 0
  return jnp.asarray(array, jnp.float32)


def test_first_moments_are_off_by_half_a_code_at_most():
  array = rows((7, 33))
  decoded = moments.decode_first(moments.encode_first(array))
  largest = jnp.abs(array).max(axis=1, keepdims=True)
  assert jnp.all(jnp.abs(decoded - array) <= largest / 254 * (1 + 1e-5))
  assert jnp.all(decoded[0] == 0)


def test_second_moments_are_off_by_less_than_a_code_and_right_on_average():
  array = jnp.square(rows((7, 33)))
  draws = jax.vmap(
    lambda seed: moments.decode_second(moments.encode_second(array, jax.random.key(seed)))
  )(jnp.arange(400))
  assert jnp.all(draws[:, 0] == 0) and jnp.all(jnp.isfinite(draws))
  floor = array.max(axis=1, keepdims=True) * 2.0 ** (-255 / 8)
  seen = jnp.broadcast_to(array > floor, draws.shape)
  octaves = jnp.log2(draws[seen] / jnp.broadcast_to(array, draws.shape)[seen])
  assert jnp.abs(octaves).max() < 1 / 8 * (1 + 1e-3)
  means = octaves.reshape(400, -1).mean(axis=0)
  # The rounding of a code has a standard deviation of at most 1/16 of an octave; the largest
  # element of a row is exact.
  assert jnp.abs(means).max() < 4 / 16 / 400**0.5
  below = jnp.broadcast_to((array <= floor) & (floor > 0), draws.shape)
  np.testing.assert_allclose(draws[below], jnp.broadcast_to(floor, draws.shape)[below], rtol=1e-4)


def descend(optimizer, steps=300):
  """Distances from the minimum of an ill-conditioned, noisy quadratic, and the last state."""
  curvature = jnp.asarray(10.0 ** np.linspace(-2, 2, 6 * 40).reshape(6, 40), jnp.float32)

  def step(carry, key):
    params, state = carry
    gradient = curvature * params + 0.1 * curvature * jax.random.normal(key, params.shape)
    updates, state = optimizer.update(gradient, state, params)
    return (params - 0.02 * updates, state), jnp.abs(params).mean()

  params = jnp.ones((6, 40))
  keys = jax.random.split(jax.random.key(1), steps)
  (_, state), distances = jax.lax.scan(step, (params, optimizer.init(params)), keys)
  return np.asarray(distances), state


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 0.01), ("int8", 0.02)])
def test_training_goes_the_way_of_float32(dtype, tolerance):
  expected, _ = descend(optax.scale_by_adam(*BETAS))
  actual, state = descend(moments.scale_by_adam(*BETAS, dtype))
  assert expected[-1] < 0.1
  assert np.abs(actual - expected).max() < tolerance
  sizes = {leaf.dtype.itemsize for leaf in jax.tree.leaves((state.mu, state.nu)) if leaf.size > 6}
  assert sizes == {jnp.dtype(dtype).itemsize}


def test_float32_is_optax_adamw_bit_for_bit():
  config = OptimizerConfig(schedule="constant", peak_learning_rate=1e-2, clip_norm=1e9)
  ours = adamw(config, Stage(steps=9, warmup_steps=0), {"w": ("model", "vocab")})
  theirs = optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
  params = {"w": rows((5, 6))}
  ours_state, theirs_state = ours.init(params), theirs.init(params)
  for seed in range(1, 4):
    gradients = {"w": rows((5, 6), seed)}
    actual, ours_state = ours.update(gradients, ours_state, params)
    expected, theirs_state = theirs.update(gradients, theirs_state, params)
    np.testing.assert_array_equal(actual["w"], expected["w"])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_in_host_memory_and_in_shards_the_numbers_are_the_same(dtype):
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Explicit,) * 2)
  sharding = NamedSharding(mesh, P("fsdp", "tensor"))
  results = []
  for offload in (False, True):
    config = OptimizerConfig(moment_dtype=dtype, offload=offload)
    optimizer = adamw(config, Stage(steps=9, warmup_steps=0), {"w": ("model", "vocab")})
    params = {"w": rows((8, 6))}
    if offload:
      params = jax.device_put(params, sharding)
      abstract = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=sharding)}
      state = abstract_state(abstract, optimizer, Trainable(), mesh, offload).optimizer_state
    with jax.set_mesh(mesh if offload else jax.sharding.get_mesh()):
      optimizer_state = jax.jit(optimizer.init)(params)
      if offload:
        kinds = jax.tree.map(lambda leaf: leaf.sharding.memory_kind, optimizer_state)
        assert kinds == jax.tree.map(lambda leaf: leaf.sharding.memory_kind, state)
        assert "pinned_host" in jax.tree.leaves(kinds)
      update = jax.jit(optimizer.update)
      for seed in range(1, 4):
        gradients = {"w": rows((8, 6), seed)}
        gradients = jax.device_put(gradients, sharding) if offload else gradients
        updates, optimizer_state = update(gradients, optimizer_state, params)
    results.append((updates, optimizer_state))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), *results)
