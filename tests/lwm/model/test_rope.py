"""Rotary positions against float64, at positions where float32 products are wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.model import RopeScaling, rope

POSITIONS = np.array([[0, 1, 4095, 131071, 1048575, 2**24 + 1, 2**30 + 12345, 2**31 - 1]], np.int32)


def exact(positions, theta, head_dim):
  frequency = theta ** -(np.arange(head_dim // 2) / (head_dim // 2))
  angle = positions[..., None].astype(np.float64) * frequency
  return np.cos(angle), np.sin(angle)


@pytest.mark.parametrize("theta", [1e4, 1e6, 5e7])
def test_angles_are_exact_at_any_position(theta):
  actual = jax.jit(lambda p: rope.rotations(p, rope.frequencies(128, theta, None)))(POSITIONS)
  np.testing.assert_allclose(actual, exact(POSITIONS, theta, 128), atol=2e-6)


def test_a_traced_theta_turns_by_equal_steps():
  """Its frequencies are float32, so this compares turns between neighbours, not angles."""
  positions = np.array([[1, 2, 10**6, 10**6 + 1]], np.int32)
  cosine, sine = jax.jit(lambda p, t: rope.rotations(p, rope.frequencies(128, t, None)))(
    positions, jnp.float32(5e7)
  )
  turn = np.arctan2(sine, cosine)[0]
  near = np.exp(1j * (turn[1] - turn[0]))
  far = np.exp(1j * (turn[3] - turn[2]))
  np.testing.assert_allclose(far, near, atol=2e-6)
  np.testing.assert_allclose(near, np.exp(1j * exact_frequency(5e7)), atol=2e-6)


def exact_frequency(theta):
  return theta ** -(np.arange(64) / 64)


def test_llama3_scaling_keeps_fast_pairs_and_slows_the_slow():
  scaling = RopeScaling(factor=8.0, original_context=8192)
  plain = rope.frequencies(128, 5e5, None)
  ratio = rope.frequencies(128, 5e5, scaling) / plain
  turns = 8192 * plain / (2 * np.pi)
  np.testing.assert_allclose(ratio[turns > 4], 1)
  np.testing.assert_allclose(ratio[turns < 1], 1 / 8)
  between = ratio[(turns >= 1) & (turns <= 4)]
  assert between.size and np.all((between > 1 / 8) & (between < 1))


def test_scores_depend_on_the_distance_only():
  rng = np.random.default_rng(0)
  query, key = rng.normal(size=(2, 1, 1, 1, 64)).astype(np.float32)
  frequency = rope.frequencies(64, 1e6, None)

  def score(query_position, key_position):
    turned = [
      rope.rotate(x, *rope.rotations(jnp.array([[position]], jnp.int32), frequency))
      for x, position in ((query, query_position), (key, key_position))
    ]
    return float((turned[0] * turned[1]).sum())

  assert score(10**6 + 17, 10**6) == pytest.approx(score(17, 0), abs=1e-4)
  assert score(18, 0) != pytest.approx(score(17, 0), abs=1e-3)
