"""Attention of a layer over the mesh: of sequences in training, and of new tokens to a cache.

Shapes: L layers, B batch, S sequence, Q new tokens, K cached tokens, H query heads, G key/value
heads, D head_dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels import decode
from kernels.attention import KeyIntervals, merge
from kernels.attention.api import choose
from kernels.decode import Quantized
from kernels.ring import Layout
from kernels.ulysses import ulysses_attention
from lwm.config.model import ModelConfig
from lwm.errors import ConfigError
from lwm.model.attention import Attend, attended
from lwm.model.cache import Cache, stripe
from lwm.parallel.sharding import ShardingRules


def attend_over_mesh(
  config: ModelConfig, rules: ShardingRules, intervals: KeyIntervals, layout: Layout
) -> Attend:
  """Ring attention combined with Ulysses, for sequences that are divided over the mesh.

  Raises:
    ConfigError: the backend that the model names does not exist, or cannot run this.
  """
  intervals = attended(config, intervals)
  query_spec = rules.spec("batch", "sequence", "heads", "head_dim")
  key_spec = rules.spec("batch", "sequence", "kv_heads", "head_dim")

  def local(query, key, value, intervals):
    try:
      choose(config.attention_backend, query, key)
    except ValueError as error:
      raise ConfigError(f"config.model.attention_backend: {error}") from error
    out, _ = ulysses_attention(
      query,
      key,
      value,
      intervals,
      layout=layout,
      ring_axis=rules.ring,
      ulysses_axis=rules.ulysses,
      soft_cap=config.attention_soft_cap,
      backend=config.attention_backend,
    )
    return out

  attend = jax.shard_map(
    local,
    in_specs=(query_spec, key_spec, key_spec, rules.spec("batch", "sequence")),
    out_specs=query_spec,
  )
  return lambda query, key, value: (attend(query, key, value, intervals), None)


def attend_to_cache(
  config: ModelConfig,
  rules: ShardingRules,
  intervals: KeyIntervals,
  cache: Cache,
  layer: jax.Array,
  count_B: jax.Array | None,
) -> Attend:
  """Writes new keys and values to the devices that hold their columns, and attends to all columns.

  Cached keys and values never travel: every device attends with all new queries to the columns that
  it holds, and results merge. If sequences are divided, the new tokens first attend to each other
  by ring attention (`_with_own_ring`).
  """
  query_spec = rules.spec("batch", "sequence", "heads", "head_dim")
  key_spec = rules.spec("batch", "sequence", "kv_heads", "head_dim")
  cache_spec: Any = rules.spec("layers", "batch", "cache", "kv_heads", "head_dim")
  is_quantized = isinstance(cache.key_LxBxKxGxD, Quantized)
  if is_quantized:
    cache_spec = Quantized(cache_spec, jax.P(*cache_spec[:-1]))  # type: ignore[arg-type]  # specs

  @functools.partial(
    jax.shard_map,
    in_specs=(
      query_spec,
      key_spec,
      key_spec,
      cache_spec,
      cache_spec,
      rules.spec("batch", None),
      rules.spec(),
      rules.spec("batch") if cache.length.ndim else rules.spec(),
      rules.spec("batch"),
    ),
    out_specs=(query_spec, cache_spec, cache_spec),
  )
  def local(query, key, value, keys, values, intervals, layer, length, count):
    num_columns = jax.tree.leaves(keys)[0].shape[2]
    placed: dict[str, Any] = dict(axis_names=rules.cache, stripe=stripe(num_columns))
    options = dict(layer=layer, soft_cap=config.attention_soft_cap, **placed)

    def write(cached, new):
      new = decode.quantize(new) if is_quantized else new
      return decode.write(cached, new, layer, length, count_B=count, **placed)

    if rules.sequence is None:
      keys, values = write(keys, key), write(values, value)
      out, _ = decode.decode_attention(query, keys, values, intervals, **options)
      return out, keys, values
    everywhere = functools.partial(
      jax.lax.all_gather, axis_name=rules.sequence, axis=1, tiled=True, to="invarying"
    )
    # Written before they are read: otherwise, XLA would copy the cache.
    keys, values = write(keys, everywhere(key)), write(values, everywhere(value))
    attend = functools.partial(decode.decode_attention, query_axes=rules.sequence, **options)
    out = _with_own_ring(
      config, rules, intervals, length, (query, key, value), keys, values, attend
    )
    return out, keys, values

  def attend(query, key, value):
    count = count_B
    if count is not None:
      count = jax.reshard(count, rules.spec("batch"))
    out, keys, values = local(
      query,
      key,
      value,
      cache.key_LxBxKxGxD,
      cache.value_LxBxKxGxD,
      intervals,
      layer,
      cache.length,
      count,
    )
    return out, cache._replace(key_LxBxKxGxD=keys, value_LxBxKxGxD=values)

  return attend


def _with_own_ring(
  config: ModelConfig,
  rules: ShardingRules,
  intervals: KeyIntervals,
  length: jax.Array,
  own: tuple[jax.Array, jax.Array, jax.Array],
  keys: decode.Cached,
  values: decode.Cached,
  attend_to_cache: Callable[..., tuple[jax.Array, jax.Array]],
) -> jax.Array:
  """Attention of divided new tokens to each other and to the columns before them.

  Call it inside `jax.shard_map`. New keys travel around the ring. Cached keys stay in place; the
  queries are gathered instead.

  Args:
    config: of the model.
    rules: over which axes sequences are divided.
    intervals: columns that each of all new tokens attends to, [B, Q].
    length: columns before the new tokens, a scalar or [B].
    own: query, key and value of this device's new tokens.
    keys: the cache; its columns of the new tokens are not read.
    values: likewise.
    attend_to_cache: attention of all new queries, divided over the axes of the sequence.
  """
  query, key, value = own
  num_own, num_tokens = query.shape[1], intervals.start_BxQ.shape[1]
  length_Bx1 = (jnp.zeros_like(intervals.start_BxQ[:, 0]) + length)[:, None]
  first = jax.lax.axis_index(rules.sequence) * num_own
  among_new = KeyIntervals(
    *(
      jax.lax.dynamic_slice_in_dim(jnp.clip(bound - length_Bx1, 0, num_tokens), first, num_own, 1)
      for bound in intervals
    )
  )
  new = ulysses_attention(
    query,
    key,
    value,
    among_new,
    layout=Layout("contiguous", jax.lax.axis_size(rules.ring)),
    ring_axis=rules.ring,
    ulysses_axis=rules.ulysses,
    soft_cap=config.attention_soft_cap,
    backend=config.attention_backend,
  )
  queries = jax.lax.all_gather(query, rules.sequence, axis=1, tiled=True)
  cached = KeyIntervals(*(jnp.minimum(bound, length_Bx1) for bound in intervals))
  old = attend_to_cache(queries, keys, values, cached)
  return merge([new, old])[0].astype(query.dtype)
