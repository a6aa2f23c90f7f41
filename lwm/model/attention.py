"""Grouped-query attention with rotary positions, over sharded tokens and heads.

Stored parameters have a leading axis of layers; `lax.scan` removes it before the layer is called.
Shapes: L layers of a stretch, B batch, S sequence, M model width, H query heads, G key/value heads,
h/g query and key/value heads of one of N groups, D head_dim, P = D/2 pairs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.attention import SAVED_NAMES, KeyIntervals, windowed
from kernels.neighbours import gather_tokens, scatter_tokens
from kernels.varying import vary_trees_alike
from lwm.config.model import ModelConfig
from lwm.cost.layer import FLOAT32_BYTES, KEPT, Division, LayerCost, dtype_bytes
from lwm.model import rope
from lwm.model.lora import num_added
from lwm.model.parameters import RMSNorm, residual_std
from lwm.model.projection import Projection, Weights, product
from lwm.parallel.sharding import ShardingRules

# A remat policy that keeps what the backward pass of attention would otherwise recompute.
SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)

# (query [B, S, H, D], key, value [B, S, G, D]) -> (out [B, S, H, D], what the caller carries on:
# a cache, or None).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

_QUERY = Projection("query", ("model", "heads", "head_dim"))
_KEY = Projection("key", ("model", "kv_heads", "head_dim"))
_VALUE = Projection("value", ("model", "kv_heads", "head_dim"))
_OUT = Projection("out", ("heads", "head_dim", "model"), num_inputs=2)


def attended(config: ModelConfig, intervals: KeyIntervals) -> KeyIntervals:
  """The keys that the model attends to: each interval, cut to the model's sliding window."""
  if config.sliding_window is None:
    return intervals
  return windowed(intervals, config.sliding_window)


class Attention(nnx.Module):
  """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

  def __init__(self, config: ModelConfig, num_layers: int, rules: ShardingRules, rngs: nnx.Rngs):
    M, D, std = config.width, config.head_dim, config.initializer_std
    H, G = config.num_heads, config.num_kv_heads
    self.rules = rules
    for projection, heads in ((_QUERY, H), (_KEY, G), (_VALUE, G)):
      projection.declare(self, config, (M, heads, D), std, num_layers, rngs, config.attention_bias)
    _OUT.declare(self, config, (H, D, M), residual_std(config), num_layers, rngs)
    self.has_norms = config.query_key_norm
    if config.query_key_norm:
      self.query_norm = RMSNorm(config, (num_layers,), D)
      self.key_norm = RMSNorm(config, (num_layers,), D)

  def __call__(
    self,
    x_BxSxM: jax.Array,
    cosine_BxSxP: jax.Array,
    sine_BxSxP: jax.Array,
    attend: Attend,
    head_groups: int = 1,
  ) -> tuple[jax.Array, Any]:
    """Attention of the block's input, [B, S, M], and what `attend` carries on.

    With several head groups, processed in turn, the queries, keys, values and gradients of only one
    group exist at a time; `attend` must then carry nothing on.
    """
    weights = [projection.gather(self, x_BxSxM.dtype) for projection in (_QUERY, _KEY, _VALUE)]

    def group(x_BxSxM, weights, index):
      query_BxSxhxD, key_BxSxgxD, value_BxSxgxD = self._project(
        x_BxSxM, weights, index, head_groups
      )
      if self.has_norms:
        query_BxSxhxD, key_BxSxgxD = self.query_norm(query_BxSxhxD), self.key_norm(key_BxSxgxD)
      query_BxSxhxD = rope.rotate(query_BxSxhxD, cosine_BxSxP, sine_BxSxP)
      key_BxSxgxD = rope.rotate(key_BxSxgxD, cosine_BxSxP, sine_BxSxP)
      return attend(query_BxSxhxD, key_BxSxgxD, value_BxSxgxD)

    if head_groups == 1:
      out_BxSxHxD, carried = group(x_BxSxM, weights, jnp.int32(0))
      return self._project_back(out_BxSxHxD[None]), carried

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=SAVE_ATTENTION)
    def one_group(x_BxSxM, weights, index):
      return group(x_BxSxM, weights, index)[0]

    out_NxBxSxhxD = jax.lax.map(
      lambda index: one_group(x_BxSxM, weights, index), jnp.arange(head_groups, dtype=jnp.int32)
    )
    return self._project_back(out_NxBxSxhxD), None

  def _project(self, x_BxSxM, weights: list[Weights], index, head_groups: int):
    """Query, key and value of all tokens, for this device's heads in one group."""
    rules, projections = self.rules, (_QUERY, _KEY, _VALUE)

    def local(x_BxSxM, index, *weights):
      if rules.residual:
        x_BxSxM = gather_tokens(x_BxSxM, rules.tensor)
      x_BxSxM, index, *weights = vary_trees_alike(x_BxSxM, index, *weights)
      return tuple(
        product("bsm,mhd->bshd", x_BxSxM, own.output_group(index, head_groups)) for own in weights
      )

    return jax.shard_map(
      local,
      in_specs=(
        rules.spec("batch", "residual", None),
        rules.spec(),
        *(projection.specs(self) for projection in projections),
      ),
      out_specs=tuple(
        rules.spec("batch", "sequence", *projection.axes[1:]) for projection in projections
      ),
    )(x_BxSxM, index, *weights)

  def _project_back(self, out_NxBxSxhxD: jax.Array) -> jax.Array:
    """Sums over the heads of all groups; each device gets its part of the residual stream."""
    rules = self.rules

    def local(out_NxBxSxhxD, weights):
      out_NxBxSxhxD, weights = vary_trees_alike(out_NxBxSxhxD, weights)
      by_group = weights.split_inputs(out_NxBxSxhxD.shape[0])
      x_BxSxM = product("nbshd,nhdm->bsm", out_NxBxSxhxD, by_group)
      if rules.residual:
        return scatter_tokens(x_BxSxM, rules.tensor)
      return jax.lax.psum(x_BxSxM, rules.tensor)

    return jax.shard_map(
      local,
      in_specs=(rules.spec(None, "batch", "sequence", "heads", "head_dim"), _OUT.specs(self)),
      out_specs=rules.spec("batch", "residual", None),
    )(out_NxBxSxhxD, _OUT.gather(self, out_NxBxSxhxD.dtype))


def attention_cost(config: ModelConfig, division: Division) -> LayerCost:
  """The cost of one attention layer with its projections, without their biases."""
  M, H, G, D = config.width, config.num_heads, config.num_kv_heads, config.head_dim
  kept, number, groups = KEPT[config.remat], dtype_bytes(config.compute_dtype), config.head_groups
  out = M * H * D
  projections = M * (H + 2 * G) * D
  shapes = {"query": (M, H * D), "key": (M, G * D), "value": (M, G * D), "out": (H * D, M)}
  added = num_added(config, shapes)
  # Head groups project their queries, keys and values once more where attention is recomputed.
  regrouped = groups > 1 and not kept.attention

  # Per token of a device, in elements. Key heads are repeated where `ulysses` has more devices.
  query, key = H * D / division.tensor, G * D / division.tensor
  local_heads = H // division.tensor
  exchanged_heads = math.lcm(G // division.tensor, division.ulysses)
  passes = 2 if kept.everything else 3
  exchanges = passes * 2 * (local_heads + exchanged_heads)
  exchanges += regrouped * (local_heads + 2 * exchanged_heads)

  recomputed = 0 if kept.products else projections + out + added
  kept_bytes = 0.0
  if kept.attention:
    kept_bytes += query * number + H / division.tensor * FLOAT32_BYTES
  if kept.products:
    kept_bytes += (query + 2 * key + M) * number
  if kept.everything:
    # The input of attention and, if queries and keys are normalised, theirs.
    kept_bytes += (M + config.query_key_norm * (query + key)) * number
  return LayerCost(
    weights=projections + out + added,
    flops=2 * (projections + out + added),
    # Query x key and weights x value.
    pair_flops=4 * H * D,
    recompute_flops=2 * (recomputed + regrouped * projections),
    # The backward kernels compute scores twice and the products with the values once more.
    recompute_pair_flops=(6 if kept.attention else 10) * H * D,
    kept=kept_bytes,
    backward=_backward_bytes(query, key, config, division),
    hop=2 * exchanged_heads * D,
    exchanged=exchanges * D,
    # A gather and a scatter in each pass. Each head group gathers its tokens, again backward.
    gathered=(2 * passes + 2 * (groups - 1) + regrouped) * M,
  )


def _backward_bytes(query: float, key: float, config: ModelConfig, division: Division) -> float:
  """Bytes per token that exist at least while the gradients of attention are computed.

  Args:
    query: elements of a token's queries on one device.
    key: elements of its keys.
    config: of the model.
    division: over devices.
  """
  number, groups = dtype_bytes(config.compute_dtype), config.head_groups
  # Query, key, value and their gradients. The query's gradient is computed alone, and has been
  # rounded before the others exist.
  held = number * 2 * (query + key) + FLOAT32_BYTES * 2 * key
  if division.ring > 1:
    # The next key and value; the gradients in float32, and those of one hop.
    held += number * (2 * key - query) + FLOAT32_BYTES * (2 * query + 2 * key)
  held /= groups
  # For all heads: the result's cotangent, and the result too where head groups run in turn.
  held += number * query * (1 if groups == 1 else 2)
  if division.tensor > 1:
    # The three gradients, and their products before they are summed over devices.
    held = max(held, number * ((query + 2 * key) / groups + config.width))
  return held
