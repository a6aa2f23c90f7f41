"""A prefix on disk: the tokens that a session has read, and their keys and values.

A prefix is read once, for example an hour of film, and used by later processes, also on another
mesh. It is a directory with `prefix.json` and the arrays, in the format of checkpoints.

L layers, S tokens, K columns of the cache, G key/value heads, D head_dim.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from kernels.decode import Quantized
from lwm.checkpoint.arrays import ArrayInfo, ArrayReader, ArrayWriter
from lwm.errors import UserError
from lwm.infer.engine import Engine, Session
from lwm.infer.programs import State
from lwm.model.cache import stripe

_DESCRIPTION = "prefix.json"
_ARRAYS = "arrays"
# Arrays whose names begin with "blocks" have an axis of layers, so they can be written by layer.
_NAME = "blocks.{}"
_TOKENS = "tokens"
_LOGITS = "logits"


def save_prefix(session: Session, path: pathlib.Path, identity: str) -> None:
  """Writes what the only row of a session has read.

  Args:
    session: of one row.
    path: directory to make.
    identity: of the model.

  Raises:
    UserError: the directory exists, or cannot be written.
  """
  if path.exists():
    raise UserError(f"{path} exists: name another directory for the prefix.")
  (tokens,) = session.tokens
  length, cache = len(tokens), session.state.cache
  leaves = _leaves(cache)
  order = _order(session.engine, session.engine.num_columns(session.capacity))[:length]
  arrays = {
    name: ArrayInfo((leaf.shape[0], length, *leaf.shape[3:]), np.dtype(leaf.dtype))
    for name, leaf in leaves.items()
  }
  logits_V = np.asarray(session.state.logits_RxV[0])
  arrays[_TOKENS] = ArrayInfo((length,), np.dtype(np.int32))
  arrays[_LOGITS] = ArrayInfo(logits_V.shape, logits_V.dtype)
  unfinished = path.with_name(path.name + ".unfinished")
  try:
    with ArrayWriter(unfinished / _ARRAYS, arrays) as writer:
      writer.write(_TOKENS, np.asarray(tokens, np.int32))
      writer.write(_LOGITS, logits_V)
      for name, leaf in leaves.items():
        for layer in range(leaf.shape[0]):
          # One layer at a time in the memory of the host.
          writer.write(name, np.asarray(leaf[layer, :1])[0][order], (layer,))
    description = {"model": identity, "cache": session.engine.cache}
    (unfinished / _DESCRIPTION).write_text(json.dumps(description))
    unfinished.rename(path)
  except OSError as error:
    raise UserError(f"{path} could not be written ({error.strerror}): fix the disk.") from error


class SavedPrefix:
  """A prefix on disk, whose description has been checked.

  Attributes:
    tokens: the ids that were read.
  """

  def __init__(self, path: pathlib.Path, identity: str, cache: str):
    """Reads the description and the tokens, but no keys and values.

    Args:
      path: of the directory.
      identity: of the model that will use it.
      cache: form of the engine's cache.

    Raises:
      UserError: it is no prefix, or one of another model or form of cache.
    """
    try:
      description = json.loads((path / _DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
      raise UserError(
        f"{path} is not a prefix: name a directory that --save_prefix made."
      ) from error
    if description["model"] != identity:
      raise UserError(
        f"The prefix {path} was made by another model: use the checkpoint that made it, or "
        "make it again."
      )
    if description["cache"] != cache:
      raise UserError(f"The prefix {path} was made with --cache={description['cache']}: add it.")
    self._reader = ArrayReader(path / _ARRAYS)
    self.tokens: list[int] = self._reader.read(_TOKENS).tolist()

  def open(self, engine: Engine, capacity: int) -> Session:
    """A session of one row that has read the prefix.

    Raises:
      UserError: the prefix is longer than the capacity.
    """
    if len(self.tokens) > capacity:
      raise UserError(
        f"The prefix has {len(self.tokens):,} tokens, more than the cache holds, {capacity:,}: "
        "make the cache larger."
      )
    state = engine.empty(1, capacity)
    num_columns, length = engine.num_columns(capacity), len(self.tokens)
    column_K = _order(engine, num_columns)
    order_K = np.argsort(column_K)
    leaves = _leaves(state.cache)
    for name, leaf in leaves.items():
      for layer in range(leaf.shape[0]):
        read = self._reader.read(name, (layer,))
        padded = np.zeros((num_columns, *read.shape[1:]), read.dtype)
        padded[:length] = read
        leaves[name] = _set_layer(leaves[name], padded[order_K], layer)
    rows = len(state.logits_RxV)
    state = State(_with_leaves(state.cache, leaves), state.logits_RxV)
    session = Session(engine, state, [list(self.tokens)], capacity)
    session.rewind([length])
    logits_RxV = np.broadcast_to(self._reader.read(_LOGITS), (rows, *state.logits_RxV.shape[1:]))
    logits_RxV = jax.device_put(logits_RxV, state.logits_RxV.sharding)
    session.state = session.state._replace(logits_RxV=logits_RxV)
    return session


def _set_layer(leaf: jax.Array, layer_Kx: np.ndarray, layer: int) -> jax.Array:
  """The array [L, R, K, ...] with one layer of all rows replaced, in place."""
  whole = leaf.sharding
  assert isinstance(whole, jax.NamedSharding)
  sharding = jax.NamedSharding(whole.mesh, jax.P(*whole.spec[1:]))
  rows = np.broadcast_to(layer_Kx[None], leaf.shape[1:])
  return _replace_layer(leaf, jax.device_put(rows, sharding), layer)


@jax.jit(donate_argnums=0)
def _replace_layer(leaf: jax.Array, new: jax.Array, layer: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(leaf, new, layer, 0)


def _leaves(cache: Any) -> dict[str, jax.Array]:
  """The arrays of keys and values by name."""
  leaves: dict[str, jax.Array] = {}
  for name, cached in (("key", cache.key_LxBxKxGxD), ("value", cache.value_LxBxKxGxD)):
    if isinstance(cached, Quantized):
      leaves |= {_NAME.format(name): cached.value, _NAME.format(f"{name}_scale"): cached.scale}
    else:
      leaves[_NAME.format(name)] = cached
  return leaves


def _with_leaves(cache: Any, leaves: dict[str, jax.Array]) -> Any:
  """The cache with these arrays of keys and values, in the order of `_leaves`."""
  both = cache.key_LxBxKxGxD, cache.value_LxBxKxGxD
  key, value = jax.tree.unflatten(jax.tree.structure(both), leaves.values())
  return cache._replace(key_LxBxKxGxD=key, value_LxBxKxGxD=value)


def _order(engine: Engine, num_columns: int) -> np.ndarray:
  """For each token, its column in the whole cache array, int64 [K].

  The array joins the devices' parts, while tokens go to the devices in turn (`stripe`).
  """
  shards = engine.num_shards
  size = stripe(num_columns // shards)
  places_DxRxS = np.arange(num_columns).reshape(shards, -1, size)
  return places_DxRxS.swapaxes(0, 1).reshape(-1)
