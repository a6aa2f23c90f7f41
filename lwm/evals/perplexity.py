"""Perplexity of a text under a model, read as a sampler reads its prompt.

B batch, S tokens, M model width, V text ids, C tokens per chunk, N chunks.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels.decode import whole_length
from lwm.model import Model

# Tokens whose logits exist at the same time.
_CHUNK = 128


def perplexity(
  model: Model, params: Any, tokens_S: jax.Array, *, rope_theta: float, int8_cache: bool = False
) -> float:
  """The exponential of the mean negative log-likelihood of all tokens after the first.

  It measures the program that samples, so the parameters may be in any form of
  lwm/infer/weights.py. Call it under `jax.set_mesh`.

  Args:
    model: built with rules that do not divide sequences.
    params: the model's parameters.
    tokens_S: int32 text ids, at least two. The softmax runs over text ids.
    rope_theta: base of RoPE.
    int8_cache: whether tokens attend to keys and values in int8.
  """
  loss = _mean_loss(model, params, tokens_S, rope_theta=rope_theta, int8_cache=int8_cache)
  return float(jnp.exp(loss))


@functools.partial(jax.jit, static_argnames=("model", "rope_theta", "int8_cache"))
def _mean_loss(
  model: Model, params: Any, tokens_S: jax.Array, *, rope_theta: float, int8_cache: bool
) -> jax.Array:
  num_targets = len(tokens_S) - 1
  devices = jax.sharding.get_abstract_mesh().shape
  # Rows of a batch divide over devices, so every device of the batch reads the same text.
  batch_size = math.prod(devices[axis] for axis in model.rules.batch)
  tokens_BxS = jnp.broadcast_to(tokens_S[None], (batch_size, len(tokens_S)))
  shards = math.prod(devices[axis] for axis in model.rules.cache)
  dtype = "int8" if int8_cache else None
  cache = model.init_cache(batch_size, whole_length(num_targets, shards), dtype=dtype)
  hidden_BxSxM, _ = model.read(params, tokens_BxS[:, :-1], cache, rope_theta=rope_theta)
  padding = -num_targets % _CHUNK
  hidden_BxSxM = jnp.pad(hidden_BxSxM, ((0, 0), (0, padding), (0, 0)))
  targets_NxC = jnp.pad(tokens_S[1:], (0, padding), constant_values=-1).reshape(-1, _CHUNK)

  def add_chunk(total, index_and_targets):
    index, targets_C = index_and_targets
    hidden_BxCxM = jax.lax.dynamic_slice_in_dim(hidden_BxSxM, index * _CHUNK, _CHUNK, axis=1)
    logits_BxCxV = jax.reshard(model.logits(params, hidden_BxCxM), jax.P())
    log_probability_CxV = jax.nn.log_softmax(logits_BxCxV[0, :, : model.config.text_vocab_size])
    chosen_C = jnp.take_along_axis(log_probability_CxV, targets_C[:, None], axis=1)[:, 0]
    return total - jnp.sum(jnp.where(targets_C >= 0, chosen_C, 0.0)), None

  chunks = jnp.arange(len(targets_NxC)), targets_NxC
  total, _ = jax.lax.scan(add_chunk, jnp.float32(0), chunks)
  return total / num_targets
