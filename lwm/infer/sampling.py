"""How one id is drawn from logits.

B rows, V vocabulary, C ids to choose from.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Choice:
  """How ids are drawn; the filters are applied in the order of the attributes.

  Attributes:
    repetition_penalty: divides positive logits of ids that the row has, and multiplies negative
      ones (CTRL, arXiv 1909.05858); 1 changes nothing.
    temperature: divides the logits; 0 takes the likeliest id.
    top_k: keeps this many of the likeliest ids; None keeps all.
    top_p: keeps the likeliest ids whose probabilities first add up to this (arXiv 1904.09751).
    min_p: keeps ids of at least this probability, relative to the likeliest (arXiv 2407.01082).
  """

  repetition_penalty: float = 1.0
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float = 1.0
  min_p: float = 0.0


def row_keys(seed_B: jax.Array, position_B: jax.Array) -> jax.Array:
  """One key per row, from its seed and the position of the token to draw: equal on any mesh."""
  return jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
    seed_B, position_B
  )


def draw(
  logits_BxC: jax.Array, key_B: jax.Array, choice: Choice, seen_BxC: jax.Array | None = None
) -> jax.Array:
  """Draws one index per row, int32 [B].

  Args:
    logits_BxC: float32, whole on every device.
    key_B: one key per row; a row's draw depends only on its logits and its key.
    choice: how to draw.
    seen_BxC: bool, the ids that a row has; needed for a repetition penalty.
  """
  penalty = choice.repetition_penalty
  if penalty != 1:
    assert seen_BxC is not None
    lower_BxC = jnp.where(logits_BxC > 0, logits_BxC / penalty, logits_BxC * penalty)
    logits_BxC = jnp.where(seen_BxC, lower_BxC, logits_BxC)
  if choice.temperature == 0:
    return jnp.argmax(logits_BxC, axis=-1).astype(jnp.int32)
  logits_BxC /= choice.temperature
  size = logits_BxC.shape[1]
  k = min(choice.top_k or size, size)
  if k < size or choice.top_p < 1:
    likeliest_Bxk = jax.lax.top_k(logits_BxC, k)[0]
    is_kept_Bxk = jnp.ones_like(likeliest_Bxk, bool)
    if choice.top_p < 1:
      probability_Bxk = jax.nn.softmax(likeliest_Bxk)
      before_Bxk = jnp.cumsum(probability_Bxk, axis=-1) - probability_Bxk
      is_kept_Bxk = before_Bxk < choice.top_p
    lowest_Bx1 = jnp.min(likeliest_Bxk, axis=-1, where=is_kept_Bxk, initial=jnp.inf, keepdims=True)
    logits_BxC = jnp.where(logits_BxC < lowest_Bx1, -jnp.inf, logits_BxC)
  if choice.min_p > 0:
    lowest_Bx1 = jnp.max(logits_BxC, axis=-1, keepdims=True) + jnp.log(choice.min_p)
    logits_BxC = jnp.where(logits_BxC < lowest_Bx1, -jnp.inf, logits_BxC)
  noise_BxC = jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(key_B)
  return jnp.argmax(logits_BxC + noise_BxC, axis=-1).astype(jnp.int32)
