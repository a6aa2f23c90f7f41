"""A decoder of the Llama family (arXiv 2302.13971) as a Flax NNX module.

Its layers come in stretches of one kind; each stretch is one `lax.scan` over stacked parameters.

Shapes: L layers, B batch, S sequence, Q new tokens, K cached tokens, M model width, H query heads,
G key/value heads, D head_dim, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from kernels import decode
from kernels.attention import SAVED_NAMES, KeyIntervals, merge
from kernels.attention.api import choose
from kernels.decode import Quantized
from kernels.quantised_matmul import columns
from kernels.ring import Layout
from kernels.ulysses import ulysses_attention
from kernels.varying import vary_trees_alike
from lwm.config.model import ModelConfig
from lwm.errors import ConfigError
from lwm.model import extras as extras_lib, quantised, rope
from lwm.model.adapter import Prompt, has_vision, has_vision_in_cache, modality_embeddings
from lwm.model.attention import SAVE_ATTENTION, Attend, attended
from lwm.model.block import KINDS
from lwm.model.cache import Cache, stripe
from lwm.model.extras import Extras
from lwm.model.parameters import RMSNorm, table
from lwm.model.projection import Projection, Stationary, Weights, is_stationary, join_width
from lwm.model.quantised import QuantizedKernel
from lwm.parallel.sharding import ShardingRules

HEAD = Projection("output", ("model", "vocab"))
_BLOCK_INPUT = "block_input"


def _offload(*names: str) -> Callable[..., Any]:
  return jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=names,
    offload_src="device",
    offload_dst="pinned_host",
  )


# What each remat policy keeps of a block for the backward pass; the rest is recomputed.
_SAVED = {
  "none": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, SAVE_ATTENTION
  ),
  "attention": SAVE_ATTENTION,
  "full": jax.checkpoint_policies.nothing_saveable,
  "offload": _offload(_BLOCK_INPUT),
  "offload_attention": _offload(_BLOCK_INPUT, *SAVED_NAMES),
}


class Decoder(nnx.Module):
  """Embedding, stretches of stacked blocks, final norm and head; text ids precede vision ids."""

  def __init__(self, config: ModelConfig, rules: ShardingRules, rngs: nnx.Rngs):
    """Declares the parameters.

    Those of the first stretch are `blocks`, those of stretch i from 1 on `blocks_i`.

    Raises:
      ConfigError: a stretch names a kind that is not in KINDS.
    """
    tables = config.table_shapes
    self.config = config
    self.rules = rules
    self.embedding = table(rngs, rules, tables["embedding"], ("vocab", "model"), config)
    for index, stretch in enumerate(config.resolved_stretches):
      if stretch.kind not in KINDS:
        raise ConfigError(
          f"config.model.stretches[{index}].kind={stretch.kind!r} must be one of "
          f"{', '.join(repr(kind) for kind in KINDS)}."
        )
      setattr(
        self, stretch_name(index), KINDS[stretch.kind](config, stretch.num_layers, rules, rngs)
      )
    self.norm = RMSNorm(config, stack=())
    if "output" in tables:
      self.output = table(rngs, rules, tables["output"], HEAD.axes, config)
    if config.adapter:
      self.adapter_modalities = modality_embeddings(config.width, rules, rngs)

  def hidden(
    self,
    tokens_BxS: jax.Array,
    positions_BxS: jax.Array,
    intervals: KeyIntervals,
    rope_theta: float | jax.Array,
    layout: Layout,
  ) -> tuple[jax.Array, Extras]:
    """Hidden states after the final norm, [B, S, M] in the compute dtype, and the extras."""
    attend = _attend_over_mesh(self.config, self.rules, intervals, layout)
    cosine, sine = self._rotations(positions_BxS, rope_theta)
    prompt = None
    if self.config.adapter:
      prompt = self._prompt(
        has_vision(self.config, self.rules, layout, tokens_BxS, intervals.start_BxQ)
      )
    x_BxSxM = self._embed(tokens_BxS)
    reported = []
    for blocks in self._stretches:
      graph, stacked_layers = nnx.split(blocks)

      @functools.partial(jax.checkpoint, prevent_cse=False, policy=_SAVED[self.config.remat])
      def block(x_BxSxM, layer):
        x_BxSxM = checkpoint_name(x_BxSxM, _BLOCK_INPUT)
        x_BxSxM, _, extras = nnx.merge(graph, layer)(
          x_BxSxM, cosine, sine, attend, self.config.head_groups, prompt
        )
        return x_BxSxM, extras

      x_BxSxM, extras = jax.lax.scan(block, x_BxSxM, stacked_layers, unroll=_uses_gloo())
      reported.append(extras)
    return self.norm(x_BxSxM), extras_lib.of_decoder(reported)

  def decode(
    self,
    tokens_BxQ: jax.Array,
    cache: Cache,
    rope_theta: float | jax.Array,
    count_B: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Hidden states of tokens that follow the cached ones, [B, Q, M], and the extended cache.

    If the rules divide sequences, so is Q. Only the first count_B[b] tokens of row b are read, and
    the others have no meaning; None: all are read.
    """
    num_tokens = tokens_BxQ.shape[1]
    rows = self.rules.spec("batch", "sequence")
    cosine, sine = self._rotations(jax.reshard(cache.positions(num_tokens), rows), rope_theta)
    intervals = attended(self.config, cache.intervals(num_tokens))
    if count_B is not None:
      is_token_BxQ = jnp.arange(num_tokens)[None] < count_B[:, None]
      stop_BxQ = jnp.where(is_token_BxQ, intervals.stop_BxQ, intervals.start_BxQ)
      intervals = intervals._replace(stop_BxQ=stop_BxQ)
    prompt = None
    if self.config.adapter:
      has_vision_BxQ, cache = has_vision_in_cache(self.config, tokens_BxQ, cache)
      prompt = self._prompt(has_vision_BxQ)
    carry = self._embed(tokens_BxQ), cache
    first_layer = 0
    for blocks, stretch in zip(self._stretches, self.config.resolved_stretches):
      graph, stacked_layers = nnx.split(blocks)
      scanned, layer_of = quantised.per_layer(stacked_layers)

      def block(carry, layer_and_index):
        x_BxQxM, cache = carry
        layer, index = layer_and_index
        attend = _attend_to_cache(self.config, self.rules, intervals, cache, index, count_B)
        x_BxQxM, cache, _ = nnx.merge(graph, layer_of(layer))(
          x_BxQxM, cosine, sine, attend, prompt=prompt
        )
        return (x_BxQxM, cache), None

      index_L = jnp.arange(first_layer, first_layer + stretch.num_layers)
      carry, _ = jax.lax.scan(block, carry, (scanned, index_L))
      first_layer += stretch.num_layers
    x_BxQxM, cache = carry
    return self.norm(x_BxQxM), cache.advance(num_tokens if count_B is None else count_B)

  def head(self, dtype: DTypeLike, whole: bool = False) -> Weights:
    """The output projection, [M, V], whole along M: the transposed embedding if tied.

    Args:
      dtype: of the weights.
      whole: the projection is whole along V too, for tokens that are divided over `tensor`.
    """
    if self.config.tied_head:
      embedding = self._embedding(dtype, whole)
      kernel = embedding if isinstance(embedding, QuantizedKernel) else embedding.T
      if is_stationary(self.rules):
        kernel = Stationary(kernel, self.rules.model, inputs=True)
      return Weights(kernel)
    return HEAD.gather(self, dtype, whole)

  def head_specs(self) -> Weights:
    """The partitions of what `head` returns, if it is not whole."""
    if self.config.tied_head:
      value, stationary = self.embedding.get_value(), is_stationary(self.rules)
      if isinstance(value, QuantizedKernel):
        kernel: Any = value.specs(self.rules, *HEAD.axes, whole=not stationary)
      elif stationary:
        kernel = self.rules.spec(*HEAD.axes)
      else:
        kernel = self.rules.gathered(*HEAD.axes)
      if stationary:
        kernel = Stationary(kernel, self.rules.model, inputs=True)
      return Weights(kernel)
    return HEAD.specs(self)

  @property
  def _stretches(self) -> list[nnx.Module]:
    return [
      getattr(self, stretch_name(index)) for index in range(len(self.config.resolved_stretches))
    ]

  def _embedding(self, dtype: DTypeLike, whole: bool) -> Any:
    value = self.embedding.get_value()
    if is_stationary(self.rules):
      return value if isinstance(value, QuantizedKernel) else value.astype(dtype)
    if isinstance(value, QuantizedKernel):
      return value.gather(self.rules, *HEAD.axes)
    return self.rules.gather(value, dtype, "vocab", "model", whole=whole)

  def _embed(self, tokens_BxS: jax.Array) -> jax.Array:
    rules, stationary = self.rules, is_stationary(self.rules)
    is_quantized = isinstance(self.embedding.get_value(), QuantizedKernel)
    # With divided sequences the table is gathered, because it is smaller than long contexts. Codes
    # are not: they serve inference, which reads few tokens at a time.
    whole = rules.residual is not None and not is_quantized

    def local(table, tokens_BxS):
      table, tokens_BxS = vary_trees_alike(table, tokens_BxS)
      if whole:
        return table[tokens_BxS]
      num_rows = table.matrix.codes.shape[2] if is_quantized else table.shape[0]
      row_BxS = tokens_BxS - num_rows * jax.lax.axis_index(rules.tensor)
      if is_quantized:
        x_BxSxM = columns(table.matrix, row_BxS)
      else:
        x_BxSxM = table.at[row_BxS].get(mode="fill", fill_value=0, wrap_negative_indices=False)
      x_BxSxM = jax.lax.psum(x_BxSxM, rules.tensor)
      return join_width(x_BxSxM, rules.model) if stationary else x_BxSxM

    value = self.embedding.get_value()
    if isinstance(value, QuantizedKernel):
      table_spec: Any = value.specs(rules, *HEAD.axes, whole=not stationary)
    elif stationary:
      table_spec = rules.spec("vocab", "model")
    else:
      table_spec = rules.gathered("vocab", "model", whole=whole)
    rows = rules.spec("batch", "residual" if whole else None)
    x_BxSxM = jax.shard_map(local, in_specs=(table_spec, rows), out_specs=jax.P(*rows, None))(
      self._embedding(jnp.float32, whole), jax.reshard(tokens_BxS, rows)
    )
    x_BxSxM = x_BxSxM.astype(self.config.compute_dtype)
    return x_BxSxM if whole else jax.reshard(x_BxSxM, rules.spec("batch", "residual", None))

  def _prompt(self, has_vision_BxS: jax.Array) -> Prompt:
    has_vision_BxS = jax.reshard(has_vision_BxS, self.rules.spec("batch", "residual"))
    return Prompt(has_vision_BxS, self.adapter_modalities.get_value())

  def _rotations(
    self, positions_BxS: jax.Array, rope_theta: float | jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    frequency_P = rope.frequencies(self.config.head_dim, rope_theta, self.config.rope_scaling)
    return rope.rotations(positions_BxS, frequency_P)


def stretch_name(stretch: int) -> str:
  """The attribute that holds a stretch, which names its parameters in checkpoints."""
  return f"blocks_{stretch}" if stretch else "blocks"


def _uses_gloo() -> bool:
  """Whether the devices are CPUs of several processes.

  XLA may run a gather inside a loop over layers at the same time as a gather outside of it, and
  gloo confuses the two. Without a loop they stay in order.
  """
  platform = jax.sharding.get_abstract_mesh().abstract_device.platform
  return platform == "cpu" and jax.process_count() > 1


def _attend_over_mesh(
  config: ModelConfig, rules: ShardingRules, intervals: KeyIntervals, layout: Layout
) -> Attend:
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


def _attend_to_cache(
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

  Inside `jax.shard_map`. The new keys travel around the ring; to the cached keys, the queries do.

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
