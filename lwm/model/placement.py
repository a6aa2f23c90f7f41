"""Where experts are computed: spare slots hold copies of hot experts, chosen in every step.

Parameters, moments and checkpoints stay where they are: each device along `rules.experts` stores
its own e experts. For each layer it also has s spare slots, which every step fills with the weights
of the experts that integer arrays name. So another placement moves no state and needs no
compilation. SYMI (arXiv 2504.19925) separates placement from optimizer state in the same way.

L layers, E experts, n devices, e = E/n experts and s spare slots per device, P = n (e + s) slots:
those of device d begin at d (e + s), with its own experts first. W = n s spare slots. A and B are
the other dimensions of a weight.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.experts.dispatch import no_gradient
from kernels.experts.slots import Slots, divided
from lwm.config.model import ExpertsConfig
from lwm.parallel.sharding import LogicalAxes, ShardingRules


def num_devices(rules: ShardingRules) -> int:
  """n: how many devices of the current mesh divide the experts of a layer."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[axis] for axis in rules.experts)


def choose_slots(config: ExpertsConfig, load_LxE: jax.Array, num_devices: int) -> Slots:
  """The slots of each layer, [L, P].

  The busiest device hands load over to the device with the least load that has a free slot, again
  and again. "move": a whole expert. "replicate": a part of one, of which the other device gets a
  copy, until that device has the mean load. So each copy can level one device, as in Vose's alias
  method (IEEE Transactions on Software Engineering, 1991). It chooses the expert that leaves the
  busier of the two devices with the least load, and ends when that load would not be less than
  before. So the largest load never rises (the test of FasterMoE's shadow experts, PPoPP 2022).
  Ties go to the lowest number.

  Args:
    config: the policy and the number of spare slots.
    load_LxE: float32, measured loads of experts. Their scale does not matter.
    num_devices: n.
  """
  choose = functools.partial(_slots_of_layer, config, num_devices)
  return jax.vmap(choose)(jax.lax.stop_gradient(load_LxE))


def _slots_of_layer(config: ExpertsConfig, n: int, load_E: jax.Array) -> Slots:
  E, s, is_copied = load_E.shape[0], config.spare_slots, config.placement == "replicate"
  expert_E, device_n = jnp.arange(E, dtype=jnp.int32), jnp.arange(n)
  is_home_Exn = expert_E[:, None] // (E // n) == device_n[None]
  mean = jnp.sum(load_E) / n

  def hand_over(_, state):
    # The load of each expert on each device, and the experts in the spare slots.
    load_Exn, spare_nxs = state
    load_n, used_n = jnp.sum(load_Exn, axis=0), jnp.sum(spare_nxs < E, axis=1)
    from_n = device_n == jnp.argmax(load_n)
    to_n = device_n == jnp.argmin(jnp.where(used_n < s, load_n, jnp.inf))
    most, least = jnp.max(load_n), jnp.sum(jnp.where(to_n, load_n, 0))
    given_E = jnp.sum(jnp.where(from_n[None], load_Exn, 0), axis=1)
    has_Exn = is_home_Exn | jnp.any(spare_nxs[None] == expert_E[:, None, None], axis=2)
    is_possible_E = (given_E > 0) & ~jnp.any(has_Exn & to_n[None], axis=1)
    if is_copied:
      # Where the other device has the mean load already, it takes half of the difference.
      given_E = jnp.minimum(given_E, jnp.where(least < mean, mean - least, (most - least) / 2))
    else:
      is_possible_E &= jnp.any(is_home_Exn & from_n[None], axis=1)
    busier_E = jnp.maximum(most - given_E, least + given_E)
    busier_E = jnp.where(is_possible_E, busier_E, jnp.inf)
    expert = jnp.argmin(busier_E).astype(jnp.int32)
    is_better = jnp.any(used_n < s) & (jnp.min(busier_E) < most)
    given_E = jnp.where((expert_E == expert) & is_better, given_E, 0)
    is_next_nxs = to_n[:, None] & (used_n[:, None] == jnp.arange(s)[None]) & is_better
    change_n = to_n.astype(load_n.dtype) - from_n
    return load_Exn + given_E[:, None] * change_n[None], jnp.where(is_next_nxs, expert, spare_nxs)

  state = jnp.where(is_home_Exn, load_E[:, None], 0), jnp.full((n, s), E, jnp.int32)
  load_Exn, spare_nxs = jax.lax.fori_loop(0, n * s, hand_over, state)
  own_E = expert_E if is_copied else jnp.where(jnp.isin(expert_E, spare_nxs), E, expert_E)
  expert_nxP = jnp.concatenate([own_E.reshape(n, -1), spare_nxs], axis=1)
  amount_nxP = jnp.take_along_axis(load_Exn.T, jnp.minimum(expert_nxP, E - 1), axis=1)
  return divided(expert_nxP.reshape(-1), amount_nxP.reshape(-1), E)


def device_loads(load_E: jax.Array, slots: Slots, num_devices: int) -> jax.Array:
  """The load of each device, [n]."""
  load_P = slots.of_experts(load_E) * slots.share_P()
  return jnp.sum(load_P.reshape(num_devices, -1), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def with_spare_slots(
  weight_ExAxB: jax.Array,
  expert_P: jax.Array,
  dtype: DTypeLike,
  rules: ShardingRules,
  logical_axes: LogicalAxes,
) -> jax.Array:
  """The weights of all slots, float32 [P, A, B], sharded like those of the experts.

  They are exchanged before they are gathered over the axes of `expert_model`, while each device has
  only its shard. The gradients of copies add up in their expert's, in float32.

  Args:
    weight_ExAxB: float32, as stored.
    expert_P: int32, the expert of each slot, or E for none. A spare slot without an expert holds
      zeros; the other slots always hold their device's own experts.
    dtype: copies travel in it, because the products round to it anyway.
    rules: the division of the parameters.
    logical_axes: of the weight.
  """
  spec = rules.spec(*logical_axes)

  def fill(weight_exAxB, expert_P):
    is_wanted_Wxe = _wanted(rules, weight_exAxB.shape[0], expert_P)
    index_W = jnp.argmax(is_wanted_Wxe, axis=1)
    is_own_W = jnp.any(is_wanted_Wxe, axis=1)
    sent_WxAxB = jnp.where(is_own_W[:, None, None], weight_exAxB.astype(dtype)[index_W], 0)
    spare_sxAxB = jax.lax.psum_scatter(sent_WxAxB, rules.experts, tiled=True)
    return jnp.concatenate([weight_exAxB, spare_sxAxB.astype(weight_exAxB.dtype)])

  return jax.shard_map(fill, in_specs=(spec, rules.spec(None)), out_specs=spec)(
    weight_ExAxB, expert_P
  )


def _fill_forward(weight_ExAxB, expert_P, dtype, rules, logical_axes):
  out_PxAxB = with_spare_slots(weight_ExAxB, expert_P, dtype, rules, logical_axes)
  return out_PxAxB, (expert_P, weight_ExAxB.shape[0])


def _fill_backward(dtype, rules, logical_axes, residuals, gradient_PxAxB):
  expert_P, E = residuals
  spec = rules.spec(*logical_axes)
  e = E // num_devices(rules)

  def collect(gradient_SxAxB, expert_P):
    is_wanted_Wxe = _wanted(rules, e, expert_P)
    gradient_WxAxB = jax.lax.all_gather(gradient_SxAxB[e:], rules.experts, tiled=True)
    return gradient_SxAxB[:e] + jnp.einsum(
      "we,wab->eab",
      is_wanted_Wxe.astype(jnp.float32),
      gradient_WxAxB,
      precision=jax.lax.Precision.HIGHEST,
    )

  gradient_ExAxB = jax.shard_map(collect, in_specs=(spec, rules.spec(None)), out_specs=spec)(
    gradient_PxAxB, expert_P
  )
  return gradient_ExAxB, no_gradient(expert_P)


with_spare_slots.defvjp(_fill_forward, _fill_backward)


def _wanted(rules: ShardingRules, e: int, expert_P: jax.Array) -> jax.Array:
  """Which of this device's experts each spare slot of all devices holds, bool [W, e]."""
  n = jax.lax.axis_size(rules.experts)
  wanted_W = expert_P.reshape(n, -1)[:, e:].reshape(-1)
  own_e = e * jax.lax.axis_index(rules.experts) + jnp.arange(e)
  return wanted_W[:, None] == own_e[None]
