"""LaVIN's mixture-of-modality adapter (arXiv 2305.15023), a kind of parameter-efficient tuning.

Each block has two adapters with a bottleneck. Their results are added to the input of attention,
with weights that a router chooses from the modality of the prompt. The prompt of a token is what
its document contains up to and including the token; its modality is vision from the document's
first vision id on. So training and decoding route every token alike.

L layers of a stretch, B batch, S sequence, Q new tokens, M model width, A = 2 adapters, R width of
the bottleneck, C chunks per ring shard, N chunks of all devices. A leading 2 is the modality.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.ring import Layout
from kernels.varying import vary_trees_alike
from lwm.config.batch import MODALITIES
from lwm.config.model import AdapterConfig, ModelConfig
from lwm.cost.layer import KEPT, Division, LayerCost, dtype_bytes
from lwm.model.cache import Cache
from lwm.model.parameters import matrix, zeros
from lwm.parallel.sharding import ShardingRules

# A glob over the names of the parameters that the adapters add: those of `Adapter`, and
# `adapter_modalities` of the decoder.
ADDED = "*adapter[._]*"
_NUM_ADAPTERS = 2

# Logical axes of the parameters, without the axis of layers.
_ROUTER = ("model", None)
_IN = ("model", None, None)
_OUT = (None, None, "model")
_MODALITIES = (None, "model")


class Prompt(NamedTuple):
  """What the router of every block knows of the tokens.

  Attributes:
    has_vision_BxS: bool, whether the prompt of each token contains a vision id; sharded like the
      residual stream.
    modalities_2xM: the learned embedding of each modality, as stored.
  """

  has_vision_BxS: jax.Array
  modalities_2xM: jax.Array


class Adapter(nnx.Module):
  """The adapters of a block: x becomes x + scale * sum over a of w_a x In_a Out_a.

  The weights w are softmax(m W / temperature), where m is the embedding of the prompt's modality
  and W is the router.
  """

  def __init__(
    self, config: AdapterConfig, width: int, num_layers: int, rules: ShardingRules, rngs: nnx.Rngs
  ):
    """Declares the parameters; the adapters change nothing at first, because Out is zero."""
    L, M, A, R, std = num_layers, width, _NUM_ADAPTERS, config.width, width**-0.5
    self.rules, self.scale, self.temperature = rules, config.scale, config.temperature
    self.router = matrix(rngs, rules, (L, M, A), ("layers", *_ROUTER), std)
    self.bottleneck_in = matrix(rngs, rules, (L, M, A, R), ("layers", *_IN), std)
    self.bottleneck_out = zeros(rules, (L, A, R, M), ("layers", *_OUT))

  def __call__(self, x_BxSxM: jax.Array, prompt: Prompt) -> jax.Array:
    """The input of attention, [B, S, M], with the adapters' results added."""
    rules = self.rules

    def local(x_BxSxM, has_vision_BxS, *weights):
      x_BxSxM, has_vision_BxS, modalities_2xM, router_MxA, in_MxAxR, out_AxRxM = vary_trees_alike(
        x_BxSxM, has_vision_BxS, *weights
      )
      logits_2xA = modalities_2xM @ router_MxA / self.temperature
      text_A, vision_A = self.scale * jax.nn.softmax(logits_2xA)
      weight_BxSxA = jnp.where(has_vision_BxS[..., None], vision_A[None, None], text_A[None, None])
      narrow_BxSxAxR = jnp.einsum("bsm,mar->bsar", x_BxSxM, in_MxAxR)
      narrow_BxSxAxR *= weight_BxSxA[..., None].astype(x_BxSxM.dtype)
      return x_BxSxM + jnp.einsum("bsar,arm->bsm", narrow_BxSxAxR, out_AxRxM)

    # The tokens are divided over `tensor` too, if sequences are divided.
    whole, dtype = rules.residual is not None, x_BxSxM.dtype
    parameters = (
      (prompt.modalities_2xM, jnp.float32, _MODALITIES),
      (self.router.get_value(), jnp.float32, _ROUTER),
      (self.bottleneck_in.get_value(), dtype, _IN),
      (self.bottleneck_out.get_value(), dtype, _OUT),
    )
    spec = rules.spec("batch", "residual", None)
    return jax.shard_map(
      local,
      in_specs=(
        spec,
        rules.spec("batch", "residual"),
        *(rules.gathered(*axes, whole=whole) for _, _, axes in parameters),
      ),
      out_specs=spec,
    )(
      x_BxSxM,
      prompt.has_vision_BxS,
      *(rules.gather(value, dtype, *axes, whole=whole) for value, dtype, axes in parameters),
    )


def modality_embeddings(width: int, rules: ShardingRules, rngs: nnx.Rngs) -> nnx.Param:
  """The embeddings of the modalities, [2, M], which all layers share."""
  return matrix(rngs, rules, (len(MODALITIES), width), _MODALITIES, 1.0)


def has_vision(
  config: ModelConfig,
  rules: ShardingRules,
  layout: Layout,
  tokens_BxS: jax.Array,
  start_BxS: jax.Array,
) -> jax.Array:
  """Whether each token's prompt contains a vision id, bool [B, S].

  No device holds a whole sequence: devices exchange one column per chunk and row.

  Args:
    config: of the model.
    rules: over which axes rows and sequences are divided.
    layout: of the columns over the ring.
    tokens_BxS: ids.
    start_BxS: the global column of the first token of each token's document.
  """
  spec = rules.spec("batch", "sequence")

  def local(tokens_BxS, start_BxS):
    num_own, neighbours = tokens_BxS.shape[1], jax.lax.axis_size(rules.ulysses)
    num_columns = num_own * neighbours * layout.ring_size
    chunk_length = layout.chunk_length(num_columns)
    offset_C = layout.chunk_offsets(jax.lax.axis_index(rules.ring), num_columns)
    # Neighbours divide the chunks of a ring shard, so a device may hold a part of a chunk.
    in_shard_S = jax.lax.axis_index(rules.ulysses) * num_own + jnp.arange(num_own, dtype=jnp.int32)
    chunk_S = in_shard_S // chunk_length
    column_S = offset_C[chunk_S] + in_shard_S % chunk_length
    is_in_chunk_CxS = chunk_S[None] == jnp.arange(len(offset_C))[:, None]
    first_C = jnp.min(jnp.where(is_in_chunk_CxS, column_S[None], num_columns), axis=1)

    vision_BxS = _vision_columns(config, tokens_BxS, column_S[None])
    last_CxB = jnp.max(jnp.where(is_in_chunk_CxS[:, None], vision_BxS[None], -1), axis=2)
    last_NxB = jax.lax.all_gather(last_CxB, (rules.ring, rules.ulysses), tiled=True)
    is_before_CxNxB = last_NxB[None] < first_C[:, None, None]
    before_CxB = jnp.max(jnp.where(is_before_CxNxB, last_NxB[None], -1), axis=1)
    # The columns of a device ascend.
    last_BxS = jnp.maximum(jax.lax.cummax(vision_BxS, axis=1), before_CxB[chunk_S].T)
    return last_BxS >= start_BxS

  return jax.shard_map(local, in_specs=(spec, spec), out_specs=spec)(tokens_BxS, start_BxS)


def has_vision_in_cache(
  config: ModelConfig, tokens_BxQ: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
  """`has_vision` of tokens that follow the cached ones, and the cache that remembers theirs."""
  assert cache.last_vision_B is not None
  vision_BxQ = _vision_columns(config, tokens_BxQ, cache.columns(tokens_BxQ.shape[1]))
  last_BxQ = jnp.maximum(jax.lax.cummax(vision_BxQ, axis=1), cache.last_vision_B[:, None])
  has_vision_BxQ = last_BxQ >= cache.start_B[:, None]
  return has_vision_BxQ, cache._replace(last_vision_B=last_BxQ[:, -1])


def _vision_columns(config: ModelConfig, tokens_BxS: jax.Array, column_BxS: jax.Array) -> jax.Array:
  """The columns of vision ids, and -1 for text ids."""
  return jnp.where(tokens_BxS >= config.text_vocab_size, column_BxS, -1)


def adapter_cost(config: ModelConfig, division: Division) -> LayerCost:
  """The cost of the adapters of one block."""
  if config.adapter is None:
    return LayerCost()
  M, A, R = config.width, _NUM_ADAPTERS, config.adapter.width
  kept, number = KEPT[config.remat], dtype_bytes(config.compute_dtype)
  products = 2 * M * A * R
  # Both products; their inputs, if everything is kept.
  kept_elements = (kept.products + kept.everything) * (A * R + M)
  return LayerCost(
    weights=products + M * A,
    flops=2 * products,
    recompute_flops=0 if kept.products else 2 * products,
    kept=kept_elements * number / division.tensor,
    moved=3 * M,
  )
