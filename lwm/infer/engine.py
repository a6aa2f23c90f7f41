"""Reads and generates tokens with a trained model on the mesh that is set.

R rows of the cache, B rows of tokens.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.decode import whole_length
from lwm import model as model_lib
from lwm.config.model import ModelConfig
from lwm.errors import UserError
from lwm.infer import programs
from lwm.infer.grammar import Grammar
from lwm.infer.programs import NOTHING, Progress, State
from lwm.model import Model
from lwm.parallel.sharding import ShardingRules

CACHE_FORMS = ("dense", "int8")
# The rest of a prompt, shorter than a chunk, is padded to one of a few widths, so that only a few
# programs are compiled.
_SHORTEST_WIDTH = 8
_WIDTH_RATIO = 4
# Up to this many tokens are not divided over the devices, because weights then need not move.
_FEW_TOKENS = 64

Rows = Sequence[Sequence[int] | np.ndarray]


def cache_bytes_per_token(config: ModelConfig, cache: str) -> int:
  """Bytes of the keys and values of one token in a cache of one of CACHE_FORMS."""
  head = config.head_dim * jnp.dtype(config.compute_dtype).itemsize
  if cache == "int8":
    head = config.head_dim + 4
  return 2 * config.num_layers * config.num_kv_heads * head


def padded_rows(num_rows: int, mesh_shape: Mapping[str, int]) -> int:
  """Rows of a state that holds `num_rows` rows: every replica of the model has the same number.

  An even number stays even, because guidance takes rows in pairs.
  """
  replicas = math.prod(mesh_shape[axis] for axis in ShardingRules.inference(few_tokens=False).batch)
  unit = math.lcm(replicas, 1 if num_rows % 2 else 2)
  return -(-num_rows // unit) * unit


@dataclasses.dataclass(frozen=True)
class Sampling:
  """What a call of `Session.generate` generates.

  Attributes:
    grammar: which ids, and how they are drawn.
    max_tokens: per row.
    guidance: see `programs.generate`.
    block: tokens that the devices generate, after the first one, before the host sees them.
  """

  grammar: Grammar
  max_tokens: int
  guidance: float | None = None
  block: int = 16


class Engine:
  """A model and its parameters, with the programs that read and generate.

  Use it under `jax.set_mesh` with the mesh that the parameters are on.

  Attributes:
    few: the model whose weights stay where they are stored, for few tokens.
    many: the model that divides sequences over devices, for chunks of a prompt. None if the mesh
      has no such axis of more than one device.
    num_read: tokens read so far, of all rows and sessions.
  """

  def __init__(
    self, model: Model, params: Any, *, rope_theta: float, chunk: int = 2048, cache: str = "dense"
  ):
    """
    Args:
      model: built with `ShardingRules.inference(few_tokens=True)`.
      params: the model's parameters, in any form.
      rope_theta: base of RoPE.
      chunk: tokens of a row that are read at a time.
      cache: one of CACHE_FORMS.
    """
    self.few, self.params, self.rope_theta = model, params, rope_theta
    self.chunk, self.cache = chunk, cache
    rules = ShardingRules.inference(few_tokens=False)
    sizes = jax.sharding.get_abstract_mesh().shape
    assert rules.residual is not None
    self._parts = int(np.prod([sizes[axis] for axis in rules.residual]))
    self.num_shards = int(np.prod([sizes[axis] for axis in rules.cache]))
    is_divided = any(sizes[axis] > 1 for axis in rules.sequence or ())
    self.many = model_lib.build(model.config, rules) if is_divided else None
    self.num_read = 0

  def open(self, rows: Rows, capacity: int) -> "Session":
    """A session that has read the rows; their common prefix is read once.

    Args:
      rows: token ids, at least one per row.
      capacity: most tokens of a row, with those to come.

    Raises:
      UserError: a row is longer than the capacity.
    """
    longest = max(map(len, rows))
    if longest > capacity:
      raise UserError(
        f"The prompt has {longest:,} tokens, more than the {capacity:,} of the cache: shorten it, "
        "or make the cache larger."
      )
    shared = _common_length(rows) if len(rows) > 1 else 0
    # Each row reads at least its last token itself, because that gives the logits after the row.
    shared = min(shared, min(map(len, rows)) - 1)
    if shared == 0:
      session = Session(self, self.empty(len(rows), capacity), [[] for _ in rows], capacity)
    else:
      prefix = self.start(capacity)
      prefix.read([rows[0][:shared]])
      session = prefix.fork(len(rows))
    session.read([row[shared:] for row in rows])
    return session

  def start(self, capacity: int) -> "Session":
    """A session of one row that has read nothing; read before generating."""
    return Session(self, self.empty(1, capacity), [[]], capacity)

  def num_columns(self, capacity: int) -> int:
    """Columns of a cache for `capacity` tokens."""
    return whole_length(capacity, self.num_shards)

  def cache_bytes(self, num_rows: int, capacity: int) -> int:
    """Bytes of a cache, on all devices together."""
    per_token = cache_bytes_per_token(self.few.config, self.cache)
    return self.padded(num_rows) * self.num_columns(capacity) * per_token

  def padded(self, num_rows: int) -> int:
    """Rows of a state that holds `num_rows` rows; see `padded_rows`."""
    return padded_rows(num_rows, jax.sharding.get_abstract_mesh().shape)

  def empty(self, num_rows: int, capacity: int) -> State:
    """A state of at least `num_rows` rows that has read nothing."""
    dtype = "int8" if self.cache == "int8" else None
    return programs.empty(self.few, self.padded(num_rows), self.num_columns(capacity), dtype)

  def read(self, state: State, rows: Rows) -> State:
    """Reads tokens after those that each row of the state has; rows may have none."""
    at, longest = 0, max(map(len, rows))
    self.num_read += sum(map(len, rows))
    rows = self.spread(rows, len(state.logits_RxV))
    while at < longest:
      size = min(self.chunk, longest - at)
      width = self._width(size)
      # Dividing a sequence pays only for many tokens.
      model = self.many if self.many and size > min(_FEW_TOKENS, self.chunk - 1) else self.few
      if model is self.many:
        width = -(-width // self._parts) * self._parts
      # Padding is 0, because `programs.read` wants text ids where it reads nothing.
      tokens_RxQ = np.zeros((len(state.logits_RxV), width), np.int32)
      count_R = np.zeros(len(tokens_RxQ), np.int32)
      for index, row in enumerate(rows):
        piece = row[at : at + size]
        tokens_RxQ[index, : len(piece)], count_R[index] = piece, len(piece)
      state = programs.read(
        model, self.few, self.params, state, tokens_RxQ, count_R, rope_theta=self.rope_theta
      )
      at += size
    return state

  @staticmethod
  def spread[T](rows: Sequence[T], num_rows: int, nothing: Any = ()) -> list[T]:
    """The values of a session's rows, one for each row of its state.

    A session's only row is repeated, because every replica of the model has a copy of it. If there
    are several, rows of the state that belong to no row of the session get `nothing`.
    """
    return [*rows] * num_rows if len(rows) == 1 else [*rows, *[nothing] * (num_rows - len(rows))]

  def _width(self, size: int) -> int:
    width = _SHORTEST_WIDTH
    while width < size:
      width *= _WIDTH_RATIO
    return min(width, self.chunk) if size <= self.chunk else self.chunk


class Session:
  """Rows of tokens, and what the model has computed of them.

  Attributes:
    engine: reads and generates.
    state: on the devices; see `Engine.spread` for its rows.
    tokens: the ids of each row that have been read.
    capacity: most tokens of a row.
  """

  def __init__(self, engine: Engine, state: State, tokens: list[list[int]], capacity: int):
    self.engine, self.state, self.tokens, self.capacity = engine, state, tokens, capacity

  def read(self, rows: Rows) -> None:
    """Reads tokens after those of each row.

    Raises:
      UserError: the cache has no room for them.
    """
    for own, row in zip(self.tokens, rows, strict=True):
      if len(own) + len(row) > self.capacity:
        raise UserError(
          f"A row of {len(own) + len(row):,} tokens is longer than the cache, which holds "
          f"{self.capacity:,}: make the cache larger."
        )
    self.state = self.engine.read(self.state, rows)
    for own, row in zip(self.tokens, rows):
      own.extend(map(int, row))

  def follow(self, rows: Rows) -> None:
    """Replaces the tokens of all rows; a prefix that a row has read already is not read again."""
    # The last token is always read: the logits after it are needed.
    kept = [min(_common_length([own, row]), len(row) - 1) for own, row in zip(self.tokens, rows)]
    if any(length < len(own) for length, own in zip(kept, self.tokens)):
      self.rewind(kept)
    self.read([row[length:] for row, length in zip(rows, kept)])

  def rewind(self, lengths: Sequence[int]) -> None:
    """Forgets all but the first tokens of each row; read at least one before generating."""
    cache = self.state.cache
    for own, length in zip(self.tokens, lengths, strict=True):
      del own[length:]
    last_vision_B = cache.last_vision_B
    if last_vision_B is not None:
      text = self.engine.few.config.text_vocab_size
      last = [max((i for i, t in enumerate(own) if t >= text), default=-1) for own in self.tokens]
      last_vision_B = self._place(last, last_vision_B)
    cache = cache._replace(
      length=self._place([len(own) for own in self.tokens], cache.length),
      last_vision_B=last_vision_B,
    )
    self.state = self.state._replace(cache=cache)

  def _place(self, values: list[int], like: jax.Array) -> jax.Array:
    spread = self.engine.spread(values, len(like), 0)
    return jax.device_put(np.asarray(spread, np.int32), like.sharding)

  def fork(self, num_rows: int) -> "Session":
    """A session of `num_rows` rows that all have read what the only row of this one has read."""
    assert len(self.tokens) == 1
    times = self.engine.padded(num_rows) // len(self.state.logits_RxV)
    state = programs.fork(self.engine.few, self.state, times)
    rows = [list(self.tokens[0]) for _ in range(num_rows)]
    return Session(self.engine, state, rows, self.capacity)

  def generate(self, sampling: Sampling, seeds: Sequence[int]) -> Iterator[list[list[int]]]:
    """Generates after the tokens of all rows, and reads what it generates.

    Args:
      sampling: what to generate. With guidance, rows come in pairs, and both get the same tokens.
      seeds: one per generated row; the same seed gives the same tokens on any mesh.

    Yields:
      The next tokens of each row, block by block.

    Raises:
      UserError: the cache has no room for the most tokens that may be generated.
    """
    engine, copies = self.engine, 1 if sampling.guidance is None else 2
    longest = max(map(len, self.tokens))
    if longest + sampling.max_tokens > self.capacity:
      raise UserError(
        f"{longest:,} tokens and {sampling.max_tokens:,} new ones are more than the cache holds, "
        f"{self.capacity:,}: generate fewer, or make the cache larger."
      )
    num_rows = len(self.state.logits_RxV) // copies
    rows = engine.spread(self.tokens[::copies], num_rows)
    seed_B = np.asarray(engine.spread(seeds, num_rows, 0), np.uint32)
    left_B = engine.spread([sampling.max_tokens] * len(seeds), num_rows, 0)
    seen_BxV = None
    if sampling.grammar.has_penalty:
      seen_BxV = np.zeros((num_rows, engine.few.config.padded_vocab_size), bool)
      for index, row in enumerate(rows):
        seen_BxV[index, list(row)] = True
    place = sampling.grammar.place_after(rows)
    progress = Progress(
      place, jnp.asarray(left_B, jnp.int32), None if seen_BxV is None else jnp.asarray(seen_BxV)
    )
    left, size = sampling.max_tokens, 1  # The host sees the first token at once.
    while left > 0:
      tokens_BxT, self.state, progress = programs.generate(
        engine.few,
        engine.params,
        self.state,
        progress,
        seed_B,
        np.int32(size),
        grammar=sampling.grammar,
        guidance=sampling.guidance,
        block=sampling.block,
        rope_theta=engine.rope_theta,
      )
      left -= size
      size = min(left, sampling.block)
      new = [row[row != NOTHING].tolist() for row in np.asarray(tokens_BxT)[: len(seeds)]]
      for index, own in enumerate(self.tokens):
        own.extend(new[index // copies])
      yield new
      if not np.asarray(progress.left_B).any():
        return


def _common_length(rows: Rows) -> int:
  """Number of tokens that all rows begin with."""
  shortest = min(map(len, rows))
  arrays = [np.asarray(row[:shortest], np.int64) for row in rows]
  same = np.all([array == arrays[0] for array in arrays], axis=0)
  return shortest if same.all() else int(np.argmin(same))
