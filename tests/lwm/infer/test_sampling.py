"""How one id is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lwm.infer import Choice
from lwm.infer.sampling import draw, row_keys

LOGITS_C = np.array([1.0, 0.5, 3.0, 2.0, -1.0])


def distribution(choice, seen_C=None, rows=20000):
  """How often each id is drawn."""
  logits_BxC = jnp.broadcast_to(jnp.asarray(LOGITS_C, jnp.float32), (rows, 5))
  key_B = row_keys(jnp.arange(rows, dtype=jnp.uint32), jnp.zeros(rows, jnp.int32))
  seen_BxC = None if seen_C is None else jnp.broadcast_to(jnp.asarray(seen_C), (rows, 5))
  drawn_B = jax.jit(draw, static_argnums=2)(logits_BxC, key_B, choice, seen_BxC)
  return np.bincount(np.asarray(drawn_B), minlength=5) / rows


def softmax_of(logits_C, kept):
  expected_C = np.zeros(5)
  expected_C[kept] = scipy.special.softmax(logits_C[kept])
  return expected_C


# Softmax of the logits: 0.09, 0.05, 0.63, 0.23, 0.01.
@pytest.mark.parametrize(
  "choice, kept",
  (
    (Choice(temperature=0.5, top_k=3), [2, 3, 0]),
    # The second likeliest id is the one that reaches the sum.
    (Choice(top_p=0.7), [2, 3]),
    (Choice(top_p=0.6), [2]),
    (Choice(top_k=4, top_p=0.9, temperature=2.0), [2, 3, 0, 1]),
    # 0.63 * 0.1 is between the third and the fourth.
    (Choice(min_p=0.1), [2, 3, 0]),
    (Choice(temperature=0), [2]),
  ),
)
def test_draws_follow_the_softmax_of_what_is_kept(choice, kept):
  expected_C = softmax_of(LOGITS_C / (choice.temperature or 1), kept)
  frequency_C = distribution(choice)
  np.testing.assert_allclose(frequency_C, expected_C, atol=0.012)
  assert not frequency_C[expected_C == 0].any()


def test_a_repetition_penalty_lowers_what_has_come():
  seen_C = np.array([True, False, True, False, True])
  lowered_C = np.where(seen_C, np.where(LOGITS_C > 0, LOGITS_C / 2, LOGITS_C * 2), LOGITS_C)
  expected_C = softmax_of(lowered_C, slice(None))
  np.testing.assert_allclose(
    distribution(Choice(repetition_penalty=2.0), seen_C), expected_C, atol=0.012
  )
