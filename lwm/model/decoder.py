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

from kernels.attention import SAVED_NAMES, KeyIntervals
from kernels.quantised_matmul import columns
from kernels.ring import Layout
from kernels.varying import vary_trees_alike
from lwm.config.model import ModelConfig
from lwm.errors import ConfigError
from lwm.model import extras as extras_lib, quantised, rope
from lwm.model.adapter import Prompt, has_vision, has_vision_in_cache, modality_embeddings
from lwm.model.attention import SAVE_ATTENTION, attended
from lwm.model.block import KINDS, Block
from lwm.model.cache import Cache
from lwm.model.experts import PADDING
from lwm.model.extras import Extras
from lwm.model.mesh_attention import attend_over_mesh, attend_to_cache
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
    attend = attend_over_mesh(self.config, self.rules, intervals, layout)
    cosine, sine = self._rotations(positions_BxS, rope_theta)
    prompt = None
    if self.config.adapter:
      prompt = self._prompt(
        has_vision(self.config, self.rules, layout, tokens_BxS, intervals.start_BxQ)
      )
    modality_BxS = self._modality(tokens_BxS, intervals) if self.config.experts else None
    x_BxSxM = self._embed(tokens_BxS)
    reported = []
    for blocks in self._stretches:
      graph, stacked_layers = nnx.split(blocks)

      @functools.partial(jax.checkpoint, prevent_cse=False, policy=_SAVED[self.config.remat])
      def block(x_BxSxM, layer_and_slots):
        layer, slots = layer_and_slots
        x_BxSxM = checkpoint_name(x_BxSxM, _BLOCK_INPUT)
        x_BxSxM, _, extras = nnx.merge(graph, layer)(
          x_BxSxM, cosine, sine, attend, self.config.head_groups, prompt, modality_BxS, slots
        )
        return x_BxSxM, extras

      layers = stacked_layers, blocks.expert_slots()
      x_BxSxM, extras = jax.lax.scan(block, x_BxSxM, layers, unroll=_uses_gloo())
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

    If the rules divide sequences, Q is divided too. Only the first count_B[b] tokens of row b are
    read, and the hidden states of the others have no meaning; None: all are read.
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
        attend = attend_to_cache(self.config, self.rules, intervals, cache, index, count_B)
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
  def _stretches(self) -> list[Block]:
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
    # If sequences are divided, gather the table: it is smaller than the activations of a long
    # context. Don't gather codes: they are for inference, which reads few tokens at a time.
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

  def _modality(self, tokens_BxS: jax.Array, intervals: KeyIntervals) -> jax.Array:
    """The modality of each token, an index in MODALITIES, or PADDING; sharded like the residual."""
    is_vision_BxS = (tokens_BxS >= self.config.text_vocab_size).astype(jnp.int32)
    is_padding_BxS = intervals.stop_BxQ <= intervals.start_BxQ
    modality_BxS = jnp.where(is_padding_BxS, PADDING, is_vision_BxS)
    return jax.reshard(modality_BxS, self.rules.spec("batch", "residual"))

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
