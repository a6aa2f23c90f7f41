"""Where experts are computed: spare slots hold copies of hot experts, chosen in every step.

Parameters, moments and checkpoints stay where they are: each device along `rules.experts` stores
its own e experts. For each layer it also has s spare slots, which every step fills with the weights
of the experts that an int32 array names. So another placement moves no state and needs no
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
from lwm.config.model import ExpertsConfig
from lwm.parallel.sharding import LogicalAxes, ShardingRules


def num_devices(rules: ShardingRules) -> int:
  """n: how many devices of the current mesh divide the experts of a layer."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[axis] for axis in rules.experts)


def choose_slots(config: ExpertsConfig, load_LxE: jax.Array, num_devices: int) -> jax.Array:
  """The expert of each slot of each layer, int32 [L, P]; E: the slot is empty.

  Greedy: the busiest device hands over an expert ("move") or shares one ("replicate"). Of its
  experts and of the devices with a free slot, the pair is chosen whose busier device has the least
  load afterwards. It ends without free slots, or when that load would not be less than before, so
  the largest load never rises (the test of FasterMoE's shadow experts, PPoPP 2022). Equal loads are
  decided by the lowest number.

  Args:
    config: the policy and the number of spare slots.
    load_LxE: float32, measured loads of experts. Their scale does not matter.
    num_devices: n.
  """
  choose = functools.partial(_slots_of_layer, config, num_devices)
  return jax.vmap(choose)(jax.lax.stop_gradient(load_LxE))


def _slots_of_layer(config: ExpertsConfig, n: int, load_E: jax.Array) -> jax.Array:
  E, s, replicate = load_E.shape[0], config.spare_slots, config.placement == "replicate"
  expert_E, device_1xn = jnp.arange(E, dtype=jnp.int32), jnp.arange(n)[None]
  is_home_Exn = expert_E[:, None] // (E // n) == device_1xn

  def add(_, state):
    has_Exn, spare_nxs = state
    copies_E = jnp.sum(has_Exn, axis=1)
    part_E = load_E / copies_E
    load_n = jnp.sum(jnp.where(has_Exn, part_E[:, None], 0), axis=0)
    is_busiest_1xn = device_1xn == jnp.argmax(load_n)
    used_n = jnp.sum(spare_nxs < E, axis=1)
    # The new copy takes the first load, and the busiest device keeps the second.
    taken_E = load_E / (copies_E + 1) if replicate else load_E
    kept_E = taken_E if replicate else jnp.zeros_like(load_E)
    is_free_Exn = ~has_Exn & (used_n < s)[None]
    target_E = jnp.argmin(jnp.where(is_free_Exn, load_n[None], jnp.inf), axis=1)
    is_target_Exn = target_E[:, None] == device_1xn
    target_load_E = jnp.sum(jnp.where(is_target_Exn, load_n[None], 0), axis=1)
    busier_E = jnp.maximum(jnp.max(load_n) - part_E + kept_E, target_load_E + taken_E)
    is_here_Exn = (has_Exn if replicate else has_Exn & is_home_Exn) & is_busiest_1xn
    is_possible_E = jnp.any(is_here_Exn, axis=1) & jnp.any(is_free_Exn, axis=1)
    busier_E = jnp.where(is_possible_E, busier_E, jnp.inf)
    expert = jnp.argmin(busier_E).astype(jnp.int32)
    is_chosen_Ex1 = (expert_E[:, None] == expert) & (jnp.min(busier_E) < jnp.max(load_n))
    is_added_Exn = is_chosen_Ex1 & is_target_Exn
    if not replicate:
      has_Exn &= ~is_chosen_Ex1
    is_next_nxs = used_n[:, None] == jnp.arange(s)[None]
    is_next_nxs &= jnp.any(is_added_Exn, axis=0)[:, None]
    return has_Exn | is_added_Exn, jnp.where(is_next_nxs, expert, spare_nxs)

  nothing_nxs = jnp.full((n, s), E, jnp.int32)
  has_Exn, spare_nxs = jax.lax.fori_loop(0, n * s, add, (is_home_Exn, nothing_nxs))
  own_E = jnp.where(jnp.any(has_Exn & is_home_Exn, axis=1), expert_E, E)
  return jnp.concatenate([own_E.reshape(n, -1), spare_nxs], axis=1).reshape(-1)


def device_loads(load_E: jax.Array, expert_P: jax.Array, num_devices: int) -> jax.Array:
  """The load of each device, [n], if copies of an expert share its load equally."""
  E = load_E.shape[0]
  is_copy_PxE = expert_P[:, None] == jnp.arange(E)[None]
  part_1xE = load_E[None] / jnp.sum(is_copy_PxE, axis=0, keepdims=True)
  return jnp.sum(jnp.where(is_copy_PxE, part_1xE, 0).reshape(num_devices, -1), axis=1)


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
    expert_P: int32, the expert of each slot; E: its weights are zeros, or those of its own expert.
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
