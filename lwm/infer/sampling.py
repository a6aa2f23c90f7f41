"""Sampling: one compiled program reads a prompt and generates the tokens after it.

B batch, P prompt tokens, T new tokens, V vocabulary, C ids to choose from.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels.decode import whole_length
from lwm.model import Model

# Marks, among forced tokens, one that is to be sampled.
SAMPLED = -1


@dataclasses.dataclass(frozen=True)
class Choice:
  """How tokens are sampled, from the ids in [start, stop).

  Attributes:
    start: first id that may be sampled.
    stop: one past the last.
    temperature: divides the logits; 0 takes the likeliest id.
    top_k: samples from this many of the likeliest ids; None samples from all.
  """

  start: int
  stop: int
  temperature: float = 1.0
  top_k: int | None = None


def draw(logits_BxV: jax.Array, key: jax.Array, choice: Choice) -> jax.Array:
  """Samples one id per row, int32 [B], from float32 logits over all ids."""
  logits_BxC = logits_BxV[:, choice.start : choice.stop]
  if choice.temperature == 0:
    return choice.start + jnp.argmax(logits_BxC, axis=-1).astype(jnp.int32)
  if choice.top_k is not None and choice.top_k < choice.stop - choice.start:
    lowest_Bx1 = jax.lax.top_k(logits_BxC, choice.top_k)[0][:, -1:]
    logits_BxC = jnp.where(logits_BxC < lowest_Bx1, -jnp.inf, logits_BxC)
  drawn_B = jax.random.categorical(key, logits_BxC / choice.temperature)
  return choice.start + drawn_B.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "choice", "rope_theta"))
def sample(
  model: Model,
  params: Any,
  prompt_BxP: jax.Array,
  forced_T: jax.Array,
  key: jax.Array,
  *,
  choice: Choice,
  rope_theta: float,
) -> jax.Array:
  """Continues prompts by T tokens. Call it under `jax.set_mesh`.

  Args:
    model: hashable, since the program is compiled once per model, choice and shape.
    params: the model's parameters.
    prompt_BxP: int32 ids, P >= 1, without padding.
    forced_T: int32; the id that each new token must have, or SAMPLED. Frames are generated with an
      <eof> forced after their codes, as LWM does (arXiv 2402.08268).
    key: the same key gives the same tokens.
    choice: how tokens are sampled.
    rope_theta: base of RoPE.

  Returns:
    The new tokens, int32 [B, T].
  """
  batch_size, prompt_length = prompt_BxP.shape
  devices = jax.sharding.get_abstract_mesh().shape
  length = whole_length(
    prompt_length + len(forced_T), math.prod(devices[axis] for axis in model.rules.cache)
  )
  cache = model.init_cache(batch_size, length)
  logits_BxV, cache = model.decode(params, prompt_BxP, cache, rope_theta=rope_theta)

  def step(carry, inputs):
    logits_BxV, cache = carry
    forced, key = inputs
    whole_BxV = jax.reshard(logits_BxV, model.rules.spec("batch", None))
    token_B = jnp.where(forced == SAMPLED, draw(whole_BxV, key, choice), forced)
    carry = model.decode(params, token_B[:, None], cache, rope_theta=rope_theta)
    return carry, token_B

  keys_T = jax.random.split(key, len(forced_T))
  _, tokens_TxB = jax.lax.scan(step, (logits_BxV, cache), (forced_T, keys_T))
  return tokens_TxB.T
