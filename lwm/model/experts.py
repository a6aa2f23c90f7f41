"""A feed-forward layer of experts, of which a router chooses a few for each token.

Stored parameters have a leading axis of layers; `lax.scan` removes it before the layer is called.
Shapes: L layers of a stretch, B batch, S sequence, T local tokens, k experts per token, M model
width, E experts, P slots (lwm/model/placement.py), F feed-forward width of an expert. A 2 is (text,
vision), as in MODALITIES.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.experts import Settings, expert_feed_forward
from kernels.experts.slots import Slots, at_home
from kernels.varying import vary_trees_alike
from lwm.config.batch import MODALITIES
from lwm.config.model import ExpertsConfig, ModelConfig
from lwm.cost.layer import KEPT, Division, LayerCost, dtype_bytes, total
from lwm.model.extras import Extras
from lwm.model.feed_forward import FeedForward, feed_forward_cost
from lwm.model.parameters import matrix, residual_std, zeros
from lwm.model.placement import choose_slots, device_loads, num_devices, with_spare_slots
from lwm.parallel.sharding import ShardingRules

# The modality of padding.
PADDING = -1

# Logical axes of the parameters, without the axis of layers.
_ROUTER = ("model", None)
_IN = ("experts", "expert_model", "expert_feed_forward")
_OUT = ("experts", "expert_feed_forward", "expert_model")


class Routing(NamedTuple):
  """What the router decides.

  Attributes:
    expert_Txk: int32, the chosen experts, the best first.
    share_Txk: float32, the factor of each expert's result.
    probability_TxE: float32, what the load-balance loss balances; sums to 1 for each token.
  """

  expert_Txk: jax.Array
  share_Txk: jax.Array
  probability_TxE: jax.Array


class _Sums(NamedTuple):
  """Sums over tokens, float32."""

  load_2xE: jax.Array  # Choices by modality.
  probability_E: jax.Array
  square: jax.Array  # Squared log-sum-exps of the logits.
  dropped: jax.Array  # Choices.


class Experts(nnx.Module):
  """SwiGLU experts: the sum of the chosen ones' results, and of the shared experts' result.

  Routers as in Mixtral (arXiv 2401.04088) or DeepSeek-V3 (arXiv 2412.19437); losses as in Switch
  Transformers (arXiv 2101.03961, load balance) and ST-MoE (arXiv 2202.08906, z-loss).
  """

  def __init__(self, config: ModelConfig, num_layers: int, rules: ShardingRules, rngs: nnx.Rngs):
    experts = config.experts
    assert experts is not None
    L, E, M, F = num_layers, experts.num_experts, config.width, experts.width
    std = config.initializer_std
    self.config, self.rules, self.chunk = experts, rules, config.feed_forward_chunk
    self.router = matrix(rngs, rules, (L, M, E), ("layers", *_ROUTER), std)
    self.expert_gate = matrix(rngs, rules, (L, E, M, F), ("layers", *_IN), std)
    self.expert_up = matrix(rngs, rules, (L, E, M, F), ("layers", *_IN), std)
    self.expert_down = matrix(rngs, rules, (L, E, F, M), ("layers", *_OUT), residual_std(config))
    if experts.router == "sigmoid":
      self.router_bias = zeros(rules, (L, E), ("layers", None))
    if experts.placement != "home":
      # A mean over steps; lwm/model/balance.py changes it.
      self.expert_load = zeros(rules, (L, E), ("layers", None))
    has_shared = experts.shared_experts > 0
    self.shared = FeedForward(_shared(config), num_layers, rules, rngs) if has_shared else None

  def slots(self) -> Slots | None:
    """The slots of each layer, [L, P]; None: each expert is computed where it is stored.

    Call it before `lax.scan` removes the axis of layers.
    """
    n = num_devices(self.rules)
    if self.config.placement == "home" or n == 1:
      return None
    return choose_slots(self.config, self.expert_load.get_value(), n)

  def __call__(
    self, x_BxSxM: jax.Array, modality_BxS: jax.Array | None, slots: Slots | None = None
  ) -> tuple[jax.Array, Extras]:
    """The layer's result for each token, [B, S, M], and what it reports.

    Args:
      x_BxSxM: sharded like the residual stream.
      modality_BxS: int32, of the tokens; PADDING is sent to no expert. None: all tokens are text.
      slots: what the method `slots` gives for this layer.

    Returns:
      The result, which the caller adds to the residual stream; and the losses `balance_loss` and
      `router_z_loss`, and the statistics `expert_load`, choices by modality and expert [2, E], and
      with a capacity `expert_dropped`, the share of choices without a place. If devices divide the
      experts, also `expert_imbalance`, the largest load of a device divided by the mean, [2]: if
      all experts were at home (computed where they are stored), and as they are placed.
    """
    rules = self.rules
    if modality_BxS is None:
      modality_BxS = jnp.zeros(
        x_BxSxM.shape[:2], jnp.int32, out_sharding=rules.spec("batch", "residual")
      )
    rows, whole = rules.spec("batch", "residual", None), rules.residual is not None
    has_bias = self.config.router == "sigmoid"
    bias_E = self.router_bias.get_value() if has_bias else None
    router = rules.gather(self.router.get_value(), jnp.float32, *_ROUTER, whole=whole)
    weights = [
      rules.gather(
        self._in_slots(parameter.get_value(), slots, x_BxSxM.dtype, axes), x_BxSxM.dtype, *axes
      )
      for parameter, axes in (
        (self.expert_gate, _IN),
        (self.expert_up, _IN),
        (self.expert_down, _OUT),
      )
    ]
    shared = self.shared if self._overlaps() else None
    out_BxSxM, sums, largest_2 = jax.shard_map(
      self._local,
      in_specs=(
        rows,
        rules.spec("batch", "residual"),
        rules.gathered(*_ROUTER, whole=whole),
        rules.spec(None) if has_bias else None,
        None if slots is None else rules.spec(None),
        None if shared is None else shared.specs(),
        *(rules.gathered(*axes) for axes in (_IN, _IN, _OUT)),
      ),
      out_specs=(rows, jax.P(), jax.P()),
    )(
      x_BxSxM,
      modality_BxS,
      router,
      bias_E,
      slots,
      None if shared is None else shared.weights(x_BxSxM.dtype),
      *weights,
    )
    if self.shared is not None and shared is None:
      out_BxSxM += self.shared(x_BxSxM)
    return out_BxSxM, self._extras(sums, largest_2)

  def _in_slots(self, weight, slots, dtype, axes):
    if slots is None:
      return weight
    return with_spare_slots(weight, slots.expert_P, dtype, self.rules, axes)

  def _local(self, x_BxSxM, modality_BxS, router_MxE, bias_E, slots, shared, gate, up, down):
    """This device's tokens, sums over the tokens of all devices, and the largest loads of any."""
    config, rules = self.config, self.rules
    x_TxM, modality_T = x_BxSxM.reshape(-1, x_BxSxM.shape[2]), modality_BxS.reshape(-1)
    x_TxM, modality_T, router_MxE, bias_E = vary_trees_alike(x_TxM, modality_T, router_MxE, bias_E)
    logits_TxE = jnp.dot(x_TxM.astype(jnp.float32), router_MxE, precision=jax.lax.Precision.HIGHEST)
    routing = route(config, logits_TxE, bias_E)
    is_token_T = modality_T != PADDING
    expert_Txk = jnp.where(is_token_T[:, None], routing.expert_Txk, config.num_experts)
    settings = self._settings(x_BxSxM.shape[0])
    out_TxM, dropped = expert_feed_forward(
      x_TxM, expert_Txk, routing.share_Txk, gate, up, down, settings, slots, shared
    )
    modality_2xT = modality_T[None] == jnp.arange(len(MODALITIES))[:, None]
    chosen_TxE = jnp.sum(jax.nn.one_hot(expert_Txk, config.num_experts), axis=1)
    square_T = jnp.square(jax.nn.logsumexp(logits_TxE, axis=1))
    sums = _Sums(
      jnp.dot(modality_2xT.astype(jnp.float32), chosen_TxE),
      jnp.sum(jnp.where(is_token_T[:, None], routing.probability_TxE, 0), axis=0),
      jnp.sum(jnp.where(is_token_T, square_T, 0)),
      dropped,
    )
    load_E = jax.lax.stop_gradient(jnp.sum(chosen_TxE, axis=0))
    return (
      out_TxM.reshape(x_BxSxM.shape),
      jax.lax.psum(sums, rules.residual_axes),
      self._largest_loads(load_E, slots, settings),
    )

  def _largest_loads(self, load_E, slots, settings: Settings):
    """The largest load of a device as a multiple of the mean, at home and as placed."""
    rules, n = self.rules, num_devices(self.rules)
    if n == 1:
      return None
    # Devices along these axes send tokens to the same experts, so their choices add up.
    senders = settings.exchange_axes
    if settings.has_part_of_tokens:
      senders = (*senders, rules.tensor)
    others = tuple(axis for axis in rules.residual_axes if axis not in senders)
    load_E = jax.lax.psum(load_E, senders)
    home = at_home(self.config.num_experts)
    largest_2 = jnp.stack(
      [jnp.max(device_loads(load_E, own, n)) for own in (home, home if slots is None else slots)]
    )
    mean = jax.lax.pmean(jnp.sum(load_E), others) / n
    return jax.lax.pmax(largest_2, others) / jnp.maximum(mean, 1e-9)

  def _overlaps(self) -> bool:
    """Whether tokens are many and divided over all axes of the experts, as in training."""
    rules = self.rules
    return rules.residual is not None and {*rules.experts} <= {*rules.residual_axes}

  def _settings(self, num_rows: int) -> Settings:
    rules, config = self.rules, self.config
    exchange = tuple(axis for axis in rules.experts if axis in rules.residual_axes)
    divides_width = rules.expert_feed_forward is not None
    mesh = jax.sharding.get_abstract_mesh()
    # As in a dense layer, a chunk is counted after tokens are gathered over `tensor`.
    has_sequences = rules.residual is not None
    sharers = mesh.shape[rules.tensor] if has_sequences else 1
    chunk = num_rows * max(self.chunk // sharers, 1)

    def shared(x_CxM, weights):
      assert self.shared is not None
      return self.shared.local(x_CxM[None], weights, chunk=chunk * sharers)[0]

    return Settings(
      num_experts=config.num_experts,
      exchange_axes=exchange,
      expert_axes=tuple(axis for axis in rules.experts if axis not in exchange),
      tensor_axis=rules.tensor if divides_width else None,
      has_part_of_tokens=divides_width and has_sequences,
      capacity_factor=config.capacity_factor,
      chunk=chunk,
      overlaps=self._overlaps(),
      shared=shared if self.shared is not None and self._overlaps() else None,
      is_ragged=mesh.abstract_device.platform == "tpu",
    )

  def _extras(self, sums: _Sums, largest_2: jax.Array | None) -> Extras:
    config = self.config
    chosen = jnp.maximum(jnp.sum(sums.load_2xE), 1)
    tokens = chosen / config.experts_per_token
    load_share_E = jnp.sum(sums.load_2xE, axis=0) / chosen
    balance = config.num_experts * jnp.sum(load_share_E * sums.probability_E / tokens)
    losses = {
      "balance_loss": config.balance_loss * balance,
      "router_z_loss": config.router_z_loss * sums.square / tokens,
    }
    statistics = {"expert_load": sums.load_2xE}
    if config.capacity_factor is not None:
      statistics["expert_dropped"] = sums.dropped / chosen
    if largest_2 is not None:
      statistics["expert_imbalance"] = largest_2
    return Extras(losses, statistics)


def route(config: ExpertsConfig, logits_TxE: jax.Array, bias_E: jax.Array | None) -> Routing:
  """Chooses experts for tokens.

  Args:
    config: the kind of router and its settings.
    logits_TxE: float32.
    bias_E: float32, added to the scores for the choice alone; None: 0.
  """
  if config.router == "sigmoid":
    score_TxE = jax.nn.sigmoid(logits_TxE)
    probability_TxE = score_TxE / jnp.sum(score_TxE, axis=1, keepdims=True)
  else:
    score_TxE = probability_TxE = jax.nn.softmax(logits_TxE, axis=1)
  chosen_by_TxE = score_TxE if bias_E is None else score_TxE + bias_E[None]
  _, expert_Txk = jax.lax.top_k(jax.lax.stop_gradient(chosen_by_TxE), config.experts_per_token)
  share_Txk = jnp.take_along_axis(score_TxE, expert_Txk, axis=1)
  if config.renormalise and config.router == "softmax":
    # The same as dividing, without its rounding errors.
    share_Txk = jax.nn.softmax(jnp.take_along_axis(logits_TxE, expert_Txk, axis=1), axis=1)
  elif config.renormalise:
    share_Txk /= jnp.sum(share_Txk, axis=1, keepdims=True)
  return Routing(expert_Txk, config.scale * share_Txk, probability_TxE)


def experts_cost(config: ModelConfig, division: Division) -> LayerCost:
  """The cost of one layer of experts with its router and its shared experts."""
  experts, M, number = config.experts, config.width, dtype_bytes(config.compute_dtype)
  assert experts is not None
  E, F, k = experts.num_experts, experts.width, experts.experts_per_token
  kept, n = KEPT[config.remat], division.experts
  # Tokens of several chunks are dispatched chunk by chunk, and nothing of a chunk is kept.
  keeps_rows = kept.everything and division.row_length <= config.feed_forward_chunk
  passes = 2 if keeps_rows else 3
  tensor = 1 if division.divides_experts else division.tensor
  has_spare = experts.placement != "home" and n > 1
  own = LayerCost(
    weights=3 * E * M * F + M * E,
    expert_weights=3 * E * M * F,
    spare_weights=3 * experts.spare_slots * M * F if has_spare else 0,
    flops=k * 6 * M * F + 2 * M * E,
    expert_flops=k * 6 * M * F,
    # The gradient of a share needs the expert's result, so the down projection runs again too.
    recompute_flops=0 if keeps_rows else k * 6 * M * F + 2 * M * E,
    expert_recompute_flops=0 if keeps_rows else k * 6 * M * F,
    kept=k * (M + 2 * F / tensor) * number if keeps_rows else 0,
    # Written and read: the rows on both sides, sorted or not, and what an expert computes of them.
    moved=k * (8 * M + 6 * F),
    # Each choice travels there and back. Where all tokens are gathered instead, the backward pass
    # needs no results of experts for the gradients of shares, because they are computed there.
    dispatched=M * (2 * passes * k if k < n else (2 + passes) * n),
  )
  if not experts.shared_experts:
    return own
  return total([(own, 1), (feed_forward_cost(_shared(config), division), 1)])


def _shared(config: ModelConfig) -> ModelConfig:
  """The model with one dense feed-forward network that is all shared experts together."""
  experts = config.experts
  assert experts is not None
  return dataclasses.replace(config, feed_forward_width=experts.shared_experts * experts.width)
