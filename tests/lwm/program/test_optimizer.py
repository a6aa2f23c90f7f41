import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.config.experiment import OptimizerConfig, Stage
from lwm.program.optimizer import adamw, learning_rate


def rates(optimizer, stage):
  return jax.vmap(learning_rate(optimizer, stage))(jnp.arange(stage.steps))


def test_constant_schedule_warms_up_and_stays():
  optimizer = OptimizerConfig(schedule="constant", peak_learning_rate=4e-5, end_learning_rate=1e-9)
  np.testing.assert_allclose(
    rates(optimizer, Stage(steps=6, warmup_steps=4)),
    [1e-5, 2e-5, 3e-5, 4e-5, 4e-5, 4e-5],
    rtol=1e-6,
  )


def test_cosine_schedule_ends_at_the_end_rate():
  optimizer = OptimizerConfig(schedule="cosine", peak_learning_rate=6e-4, end_learning_rate=6e-5)
  values = rates(optimizer, Stage(steps=102, warmup_steps=2))
  np.testing.assert_allclose(values[:2], [3e-4, 6e-4], rtol=1e-6)
  # Halfway between the warm-up and the end, the rate is halfway between the two rates.
  np.testing.assert_allclose(values[51], (6e-4 + 6e-5) / 2, rtol=1e-5)
  np.testing.assert_allclose(values[-1], 6e-5, rtol=1e-5)
  assert np.all(np.diff(values[1:]) < 0)


def test_no_warmup_starts_at_the_peak():
  optimizer = OptimizerConfig(schedule="constant", peak_learning_rate=1e-3)
  np.testing.assert_allclose(rates(optimizer, Stage(steps=2, warmup_steps=0)), 1e-3, rtol=1e-6)


def test_a_stage_overrides_the_schedule():
  optimizer = OptimizerConfig(schedule="constant", peak_learning_rate=1e-3, end_learning_rate=1e-3)
  stage = Stage(
    steps=50, warmup_steps=0, schedule="cosine", peak_learning_rate=2e-3, end_learning_rate=5e-4
  )
  values = rates(optimizer, stage)
  assert values[0] > 1.9e-3
  np.testing.assert_allclose(values[-1], 5e-4, rtol=1e-5)


@pytest.fixture
def parameters():
  logical_axes = {
    "norm": ("layers", None),
    "matrix": ("layers", "model", "feed_forward"),
    "head": ("model", "vocab"),
  }
  params = {"norm": jnp.ones((2, 3)), "matrix": jnp.ones((2, 3, 4)), "head": jnp.ones((3, 5))}
  return params, logical_axes


def test_weights_decay_and_norms_do_not(parameters):
  params, logical_axes = parameters
  optimizer = adamw(
    OptimizerConfig(schedule="constant", peak_learning_rate=0.1, weight_decay=0.5),
    Stage(steps=3, warmup_steps=0),
    logical_axes,
  )
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zero, optimizer.init(params), params)
  np.testing.assert_allclose(updates["norm"], 0)
  np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)
  np.testing.assert_allclose(updates["head"], -0.05, rtol=1e-6)


def test_matches_adamw_written_out(parameters):
  params, logical_axes = parameters
  config = OptimizerConfig(
    schedule="constant",
    peak_learning_rate=1e-2,
    beta1=0.8,
    beta2=0.9,
    epsilon=1e-3,
    weight_decay=0.1,
    clip_norm=2.0,
  )
  optimizer = adamw(config, Stage(steps=10, warmup_steps=0), logical_axes)
  state = optimizer.init(params)
  rng = np.random.default_rng(0)
  expected = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  first = jax.tree.map(np.zeros_like, expected)
  second = jax.tree.map(np.zeros_like, expected)
  for count in range(1, 4):
    gradients = jax.tree.map(lambda x: rng.normal(size=x.shape), expected)
    updates, state = optimizer.update(
      jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradients), state, params
    )
    params = jax.tree.map(jnp.add, params, updates)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradients)))
    assert norm > config.clip_norm
    for name, gradient in gradients.items():
      gradient = gradient * config.clip_norm / norm
      first[name] = 0.8 * first[name] + 0.2 * gradient
      second[name] = 0.9 * second[name] + 0.1 * gradient**2
      step = first[name] / (1 - 0.8**count) / (np.sqrt(second[name] / (1 - 0.9**count)) + 1e-3)
      decay = 0 if name == "norm" else 0.1 * expected[name]
      expected[name] = expected[name] - 1e-2 * (step + decay)
  for name in params:
    np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)
