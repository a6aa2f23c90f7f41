"""A decoder of the Llama family (arXiv 2302.13971) as a Flax NNX module.

Shapes: L layers, B batch, S sequence, Q new tokens, K cached tokens, M model width, H query heads,
G key/value heads, D head_dim, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kernels import decode
from kernels.attention import SAVED_NAMES, KeyIntervals
from kernels.ring import Layout
from kernels.ulysses import ulysses_attention
from kernels.varying import vary_alike
from lwm.config.model import ModelConfig
from lwm.model import rope
from lwm.model.attention import SAVE_ATTENTION, Attend
from lwm.model.block import Block
from lwm.model.cache import Cache
from lwm.model.parameters import RMSNorm, matrix
from lwm.parallel.sharding import ShardingRules

_BLOCK_INPUT = "block_input"


def _offload(*names: str):
  return jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=names,
    offload_src="device",
    offload_dst="pinned_host",
  )


# What the backward pass finds again of a block; the rest is computed a second time.
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
  """Embedding, stacked blocks, final norm and head. Ids of text come before those of vision."""

  def __init__(self, config: ModelConfig, rules: ShardingRules, rngs: nnx.Rngs):
    V, M, std = config.vocab_size, config.width, config.initializer_std
    self.config = config
    self.rules = rules
    self.embedding = matrix(rngs, rules, (V, M), ("vocab", "model"), std)
    self.blocks = Block(config, rules, rngs)
    self.norm = RMSNorm(config, stack=())
    if not config.tied_head:
      self.output = matrix(rngs, rules, (M, V), ("model", "vocab"), std)

  def hidden(self, tokens_BxS, positions_BxS, intervals, rope_theta, layout) -> jax.Array:
    """Hidden states after the final norm, [B, S, M] in the compute dtype."""
    attend = _attend_over_mesh(self.rules, intervals, layout)
    graph, stacked_layers = nnx.split(self.blocks)
    cosine, sine = self._rotations(positions_BxS, rope_theta)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=_SAVED[self.config.remat])
    def block(x_BxSxM, layer):
      x_BxSxM = checkpoint_name(x_BxSxM, _BLOCK_INPUT)
      return nnx.merge(graph, layer)(x_BxSxM, cosine, sine, attend, self.config.head_groups)

    x_BxSxM, _ = jax.lax.scan(
      block, self._embed(tokens_BxS), stacked_layers, unroll=_meets_over_gloo()
    )
    return self.norm(x_BxSxM)

  def decode(self, tokens_BxQ: jax.Array, cache: Cache, rope_theta) -> tuple[jax.Array, Cache]:
    """Hidden states of the tokens that follow the cache's, [B, Q, M], and the cache with them."""
    graph, stacked_layers = nnx.split(self.blocks)
    cosine, sine = self._rotations(cache.positions(tokens_BxQ.shape[1]), rope_theta)

    def block(carry, layer_and_index):
      x_BxQxM, cache = carry
      layer, index = layer_and_index
      attend = functools.partial(_attend_to_cache, self.rules, cache, index)
      return nnx.merge(graph, layer)(x_BxQxM, cosine, sine, attend), None

    index_L = jnp.arange(self.config.num_layers)
    carry = self._embed(tokens_BxQ), cache
    (x_BxQxM, cache), _ = jax.lax.scan(block, carry, (stacked_layers, index_L))
    return self.norm(x_BxQxM), cache.advance(tokens_BxQ.shape[1])

  def head(self, whole: bool = False) -> jax.Array:
    """The output projection, float32 [M, V], whole along M: transposed embedding if tied.

    Args:
      whole: along V as well, for tokens that are divided over `tensor`.
    """
    if self.config.tied_head:
      return self._embedding(whole).T
    return self.rules.gather(self.output[...], jnp.float32, "model", "vocab", whole=whole)

  def _embedding(self, whole: bool) -> jax.Array:
    return self.rules.gather(self.embedding[...], jnp.float32, "vocab", "model", whole=whole)

  def _embed(self, tokens_BxS: jax.Array) -> jax.Array:
    rules = self.rules
    # The table comes to the tokens: where contexts are long it is the smaller of the two.
    whole = rules.residual is not None

    def local(table_VxM, tokens_BxS):
      table_VxM, tokens_BxS = vary_alike(table_VxM, tokens_BxS)
      if whole:
        return table_VxM[tokens_BxS]
      row_BxS = tokens_BxS - table_VxM.shape[0] * jax.lax.axis_index(rules.tensor)
      x_BxSxM = table_VxM.at[row_BxS].get(mode="fill", fill_value=0, wrap_negative_indices=False)
      return jax.lax.psum(x_BxSxM, rules.tensor)

    x_BxSxM = jax.shard_map(
      local,
      in_specs=(rules.gathered("vocab", "model", whole=whole), rules.spec("batch", "residual")),
      out_specs=rules.spec("batch", "residual", None),
    )(self._embedding(whole), jax.reshard(tokens_BxS, rules.spec("batch", "residual")))
    return x_BxSxM.astype(self.config.compute_dtype)

  def _rotations(self, positions_BxS, rope_theta):
    frequency_P = rope.frequencies(self.config.head_dim, rope_theta, self.config.rope_scaling)
    return rope.rotations(positions_BxS, frequency_P)


def _meets_over_gloo() -> bool:
  """Whether devices are CPUs of several processes.

  XLA lets what a loop over layers gathers run beside what is gathered outside of it, and gloo takes
  the one for the other; without a loop they keep their order.
  """
  platform = jax.sharding.get_abstract_mesh().abstract_device.platform
  return platform == "cpu" and jax.process_count() > 1


def _attend_over_mesh(rules: ShardingRules, intervals: KeyIntervals, layout: Layout) -> Attend:
  rows = rules.spec("batch", "sequence")
  query_spec = rules.spec("batch", "sequence", "heads", "head_dim")
  key_spec = rules.spec("batch", "sequence", "kv_heads", "head_dim")
  ring_axis, ulysses_axis = rules.sequence
  attend = jax.shard_map(
    lambda *arguments: ulysses_attention(
      *arguments, layout=layout, ring_axis=ring_axis, ulysses_axis=ulysses_axis
    )[0],
    in_specs=(query_spec, key_spec, key_spec, KeyIntervals(rows, rows)),
    out_specs=query_spec,
  )
  return lambda query, key, value: (attend(query, key, value, intervals), None)


def _attend_to_cache(rules: ShardingRules, cache: Cache, layer: jax.Array, query, key, value):
  """Writes the new keys and values where they belong, each device its part, and attends to all."""
  rows = rules.spec("batch", None)
  query_spec = rules.spec("batch", None, "heads", "head_dim")
  key_spec = rules.spec("batch", None, "kv_heads", "head_dim")
  cache_spec = rules.spec("layers", "batch", "cache", "kv_heads", "head_dim")

  def local(query, key, value, keys, values, intervals, layer, length):
    keys = decode.write(keys, key, layer, length, rules.cache)
    values = decode.write(values, value, layer, length, rules.cache)
    out, _ = decode.decode_attention(
      query, keys, values, intervals, layer=layer, axis_names=rules.cache
    )
    return out, keys, values

  out, keys, values = jax.shard_map(
    local,
    in_specs=(
      query_spec,
      key_spec,
      key_spec,
      cache_spec,
      cache_spec,
      KeyIntervals(rows, rows),
      rules.spec(),
      rules.spec(),
    ),
    out_specs=(query_spec, cache_spec, cache_spec),
  )(
    query,
    key,
    value,
    cache.key_LxBxKxGxD,
    cache.value_LxBxKxGxD,
    cache.intervals(query.shape[1]),
    layer,
    cache.length,
  )
  return out, cache._replace(key_LxBxKxGxD=keys, value_LxBxKxGxD=values)
