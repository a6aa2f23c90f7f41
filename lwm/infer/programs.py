"""What devices run: reading tokens into a cache, and generating tokens after them.

R rows of the cache, B rows that are generated (each has two rows of the cache with guidance), Q
tokens to read, T tokens of a block, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lwm.infer.grammar import Grammar, Place
from lwm.infer.sampling import row_keys
from lwm.model import Cache, Model

# Marks, in a block of generated tokens, that the row had ended.
NOTHING = -1


class State(NamedTuple):
  """What rows have read, on the devices.

  Calls that extend a state donate its buffers, so the old state must not be used again.

  Attributes:
    cache: its rows have their own lengths.
    logits_RxV: float32, after the last token of each row.
  """

  cache: Cache
  logits_RxV: jax.Array


class Progress(NamedTuple):
  """Where generation is.

  Attributes:
    place: of each row in the grammar.
    left_B: int32, tokens that each row may still get; 0 when it has ended.
    seen_BxV: bool, the ids that a row has; None without a repetition penalty.
  """

  place: Place
  left_B: jax.Array
  seen_BxV: jax.Array | None


@functools.partial(jax.jit, static_argnames=("model", "num_rows", "num_columns", "dtype"))
def empty(model: Model, num_rows: int, num_columns: int, dtype: DTypeLike | None) -> State:
  """A state that has read nothing, with room for `num_columns` tokens in each row."""
  cache = model.init_cache(num_rows, num_columns, dtype=dtype, row_lengths=True)
  logits = jnp.zeros(
    (num_rows, model.config.padded_vocab_size), out_sharding=model.rules.spec("batch", None)
  )
  return State(cache, logits)


@functools.partial(
  jax.jit, static_argnames=("model", "head", "rope_theta"), donate_argnames=("state",)
)
def read(
  model: Model,
  head: Model,
  params: Any,
  state: State,
  tokens_RxQ: jax.Array,
  count_R: jax.Array,
  *,
  rope_theta: float,
) -> State:
  """Reads the first count_R[r] tokens of each row. Call it under `jax.set_mesh`.

  Args:
    model: of either kind of `ShardingRules.inference`.
    head: the model of few tokens, which computes the logits of the last ones.
    params: the model's parameters.
    state: has room for the tokens.
    tokens_RxQ: int32 ids; ids that are not read are text ids.
    count_R: int32, in [0, Q].
    rope_theta: base of RoPE.
  """
  rows = model.rules.spec("batch")
  count_R = jax.reshard(count_R, rows)
  hidden_RxQxM, cache = model.read(
    params, tokens_RxQ, state.cache, rope_theta=rope_theta, count_B=count_R
  )
  logits_RxV = _logits_of_last(head, params, hidden_RxQxM, count_R)
  logits_RxV = jnp.where(count_R[:, None] > 0, logits_RxV, state.logits_RxV)
  return State(cache, logits_RxV)


def _logits_of_last(
  model: Model, params: Any, hidden_RxQxM: jax.Array, count_R: jax.Array
) -> jax.Array:
  """Logits after the last token of each row, [R, V]."""
  rows = model.rules.spec("batch")
  num_tokens = hidden_RxQxM.shape[1]
  is_last_RxQ = jnp.arange(num_tokens)[None] == jnp.maximum(count_R, 1)[:, None] - 1
  is_last_RxQ = jax.reshard(is_last_RxQ, jax.P(*jax.typeof(hidden_RxQxM).sharding.spec[:2]))
  # Tokens may be divided over devices. All terms of this sum but the last token's are zero.
  last_RxM = jnp.einsum(
    "rqm,rq->rm",
    hidden_RxQxM,
    is_last_RxQ.astype(hidden_RxQxM.dtype),
    out_sharding=jax.P(*rows, None),
  )
  logits_Rx1xV = model.logits(params, last_RxM[:, None])
  return jax.reshard(logits_Rx1xV[:, 0], jax.P(*rows, None))


@functools.partial(
  jax.jit,
  static_argnames=("model", "grammar", "guidance", "block", "rope_theta"),
  donate_argnames=("state", "progress"),
)
def generate(
  model: Model,
  params: Any,
  state: State,
  progress: Progress,
  seed_B: jax.Array,
  limit: jax.Array,
  *,
  grammar: Grammar,
  guidance: float | None,
  block: int,
  rope_theta: float,
) -> tuple[jax.Array, State, Progress]:
  """Generates and reads up to `limit` tokens per row; it returns early when all rows have ended.

  Args:
    model: built with `ShardingRules.inference(few_tokens=True)`.
    params: the model's parameters.
    state: has room for the tokens, in the rows that have not ended.
    progress: as the last call returned it.
    seed_B: uint32; a token depends on the row's seed, its position, and its logits.
    limit: int32 scalar, at most `block`.
    grammar: draws the tokens.
    guidance: if given, rows 2 b and 2 b + 1 of the cache are a prompt and its unconditional form,
      and logits of vision ids are u + guidance (c - u), as in LWM (classifier-free guidance, arXiv
      2207.12598).
    block: T.
    rope_theta: base of RoPE.

  Returns:
    Tokens, int32 [B, T], with NOTHING after the end of a row; the state; the progress.
  """
  num_rows, copies = len(seed_B), 1 if guidance is None else 2

  def is_going(carry):
    step, _, _, progress = carry
    return (step < limit) & jnp.any(progress.left_B > 0)

  def step(carry):
    index, tokens_BxT, state, (place, left_B, seen_BxV) = carry
    # Every device draws for all rows.
    logits_RxV = jax.reshard(state.logits_RxV, jax.P(None, None))
    position_R = jax.reshard(state.cache.length - state.cache.start_B, jax.P(None))
    logits_BxV = logits_RxV[::copies]
    if guidance is not None:
      without_BxV = logits_RxV[1::copies]
      guided_BxV = without_BxV + guidance * (logits_BxV - without_BxV)
      logits_BxV = jnp.where(grammar.is_vision(place)[:, None], guided_BxV, logits_BxV)
    key_B = row_keys(seed_B, position_R[::copies])
    token_B = grammar.choose(place, logits_BxV, key_B, seen_BxV)
    is_live_B = left_B > 0
    new_place, is_end_B = grammar.advance(place, token_B)
    place = jax.tree.map(
      lambda new, old: jnp.where(is_live_B.reshape(-1, *(1,) * (new.ndim - 1)), new, old),
      new_place,
      place,
    )
    left_B = jnp.where(is_live_B & ~is_end_B, left_B - 1, 0)
    if seen_BxV is not None:
      seen_BxV = seen_BxV.at[jnp.arange(num_rows), token_B].set(True)
    shown_B = jnp.where(is_live_B, token_B, NOTHING)
    tokens_BxT = jax.lax.dynamic_update_slice(tokens_BxT, shown_B[:, None], (0, index))
    token_R, count_R = (
      jnp.repeat(array, copies) for array in (token_B, is_live_B.astype(jnp.int32))
    )
    # Ids that are not read must be text.
    token_R = jnp.where(count_R > 0, token_R, 0)
    rows = model.rules.spec("batch")
    count_R = jax.reshard(count_R, rows)
    hidden_Rx1xM, cache = model.read(
      params, token_R[:, None], state.cache, rope_theta=rope_theta, count_B=count_R
    )
    logits_Rx1xV = jax.reshard(model.logits(params, hidden_Rx1xM), jax.P(*rows, None, None))
    logits_RxV = jnp.where(count_R[:, None] > 0, logits_Rx1xV[:, 0], state.logits_RxV)
    return index + 1, tokens_BxT, State(cache, logits_RxV), Progress(place, left_B, seen_BxV)

  tokens_BxT = jnp.full((num_rows, block), NOTHING, jnp.int32)
  carry = jnp.int32(0), tokens_BxT, state, progress
  _, tokens_BxT, state, progress = jax.lax.while_loop(is_going, step, carry)
  return tokens_BxT, state, progress


@functools.partial(jax.jit, static_argnames=("model", "times"))
def fork(model: Model, state: State, times: int) -> State:
  """Each row `times` times in a row."""

  def repeated(leaf: jax.Array) -> jax.Array:
    axis = 1 if leaf.ndim > 3 else 0
    # Each device repeats the rows that it holds.
    spec = jax.typeof(leaf).sharding.spec
    return jax.shard_map(lambda own: jnp.repeat(own, times, axis), in_specs=spec, out_specs=spec)(
      leaf
    )

  return jax.tree.map(repeated, state)
