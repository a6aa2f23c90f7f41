"""Slots of devices, each of which computes an expert for some of its tokens.

E experts, P slots. The slots of an expert divide its tokens, in the order of the slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Parts of an expert's tokens are multiples of 1 / WHOLE of them.
WHOLE = 1 << 16


class Slots(NamedTuple):
  """What each slot computes. All arrays are int32, [P], or with leading axes.

  Attributes:
    expert_P: the expert; E: none. Slots of one expert belong to different devices.
    begin_P: the part of the expert's tokens before this slot's, in multiples of 1 / WHOLE: 0 in the
      expert's first slot, and `end_P` of the slot before in the others.
    end_P: the part up to the last of this slot's; WHOLE in the expert's last slot.
  """

  expert_P: jax.Array
  begin_P: jax.Array
  end_P: jax.Array

  def share_P(self) -> jax.Array:
    """How much of its expert's tokens each slot computes, float32, from 0 to 1."""
    return (self.end_P - self.begin_P) / WHOLE

  def of_experts(self, values_E: jax.Array) -> jax.Array:
    """The value of each slot's expert; 0 if it has none."""
    E = values_E.shape[0]
    return jnp.where(self.expert_P < E, values_E[jnp.minimum(self.expert_P, E - 1)], 0)


def at_home(num_experts: int) -> Slots:
  """Slot i computes expert i alone."""
  expert_E = jnp.arange(num_experts, dtype=jnp.int32)
  return Slots(expert_E, jnp.zeros_like(expert_E), jnp.full_like(expert_E, WHOLE))


def divided(expert_P: jax.Array, amount_P: jax.Array, num_experts: int) -> Slots:
  """Slots that divide the tokens of each expert in proportion to amounts.

  Args:
    expert_P: int32, the expert of each slot; E: none.
    amount_P: float32, at least 0. The last slot of an expert takes all if its amounts are zero.
    num_experts: E.
  """
  is_same_PxP = (expert_P[:, None] == expert_P[None]) & (expert_P < num_experts)[None]
  total_P = jnp.sum(jnp.where(is_same_PxP, amount_P[None], 0), axis=1)
  parts_P = jnp.round(WHOLE * amount_P / jnp.where(total_P == 0, 1, total_P)).astype(jnp.int32)
  is_before_PxP = is_same_PxP & jnp.tril(jnp.ones_like(is_same_PxP), -1)
  begin_P = jnp.sum(jnp.where(is_before_PxP, parts_P[None], 0), axis=1, dtype=jnp.int32)
  is_last_P = ~jnp.any(is_same_PxP & jnp.triu(jnp.ones_like(is_same_PxP), 1), axis=1)
  end_P = jnp.where(is_last_P, WHOLE, begin_P + parts_P)
  return Slots(expert_P, jnp.minimum(begin_P, WHOLE), jnp.minimum(end_P, WHOLE))
