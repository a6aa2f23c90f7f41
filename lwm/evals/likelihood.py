"""The likelihood of given tokens under a model, read by the engine that generates.

R rows, Q tokens of a chunk, S tokens, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwm.infer import Engine
from lwm.model import Cache, Model

# Tokens of a row whose logits exist at the same time.
_CHUNK = 128


class Likelihood(NamedTuple):
  """What a model thinks of each token of a row after the first.

  Attributes:
    loss: float32 [S - 1], negative log-likelihood in nats, among the ids of the token's modality.
    is_likeliest: bool [S - 1], whether greedy decoding would have chosen the token.
  """

  loss: np.ndarray
  is_likeliest: np.ndarray


def likelihoods(engine: Engine, rows: Sequence[Sequence[int]]) -> list[Likelihood]:
  """Reads rows of at least two ids, all at the same time. Call it under `jax.set_mesh`."""
  longest = max(map(len, rows)) - 1
  cache = engine.empty(len(rows), -(-longest // _CHUNK) * _CHUNK).cache
  num_rows = len(cache.start_B)
  spread = engine.spread(rows, num_rows)
  chunks = []
  for first in range(0, longest, _CHUNK):
    tokens_RxQ = np.zeros((num_rows, _CHUNK), np.int32)
    targets_RxQ = np.zeros_like(tokens_RxQ)
    count_R = np.zeros(num_rows, np.int32)
    for index, row in enumerate(spread):
      targets = row[first + 1 : first + 1 + _CHUNK]
      count_R[index] = len(targets)
      targets_RxQ[index, : len(targets)] = targets
      tokens_RxQ[index, : len(targets)] = row[first : first + len(targets)]
    cache, loss_RxQ, likeliest_RxQ = _read(
      engine.few,
      engine.params,
      cache,
      tokens_RxQ,
      targets_RxQ,
      count_R,
      rope_theta=engine.rope_theta,
    )
    chunks.append((np.asarray(loss_RxQ), np.asarray(likeliest_RxQ)))
  loss_RxS, likeliest_RxS = (np.concatenate(parts, axis=1) for parts in zip(*chunks))
  return [
    Likelihood(loss_RxS[index, : len(row) - 1], likeliest_RxS[index, : len(row) - 1])
    for index, row in enumerate(rows)
  ]


@functools.partial(jax.jit, static_argnames=("model", "rope_theta"), donate_argnames=("cache",))
def _read(
  model: Model,
  params: Any,
  cache: Cache,
  tokens_RxQ: jax.Array,
  targets_RxQ: jax.Array,
  count_R: jax.Array,
  *,
  rope_theta: float,
) -> tuple[Cache, jax.Array, jax.Array]:
  """Reads a chunk; losses and whether each target is the likeliest id, [R, Q]."""
  rows = model.rules.spec("batch")
  hidden_RxQxM, cache = model.read(
    params, tokens_RxQ, cache, rope_theta=rope_theta, count_B=jax.reshard(count_R, rows)
  )
  logits_RxQxV = jax.reshard(model.logits(params, hidden_RxQxM), jax.P(*rows, None, None))
  targets_RxQ = jax.reshard(targets_RxQ, jax.P(*rows, None))
  text_size = model.config.text_vocab_size
  id_RxQxV = jax.lax.broadcasted_iota(
    jnp.int32, logits_RxQxV.shape, 2, out_sharding=jax.P(*rows, None, None)
  )
  is_same_RxQxV = (id_RxQxV >= text_size) == (targets_RxQ >= text_size)[..., None]
  logits_RxQxV = jnp.where(is_same_RxQxV, logits_RxQxV, -jnp.inf)
  is_target_RxQxV = id_RxQxV == targets_RxQ[..., None]
  chosen_RxQ = jnp.sum(jnp.where(is_target_RxQxV, logits_RxQxV, 0.0), axis=-1)
  loss_RxQ = jax.nn.logsumexp(logits_RxQxV, axis=-1) - chosen_RxQ
  return cache, loss_RxQ, jnp.argmax(logits_RxQxV, axis=-1) == targets_RxQ
