"""Measures what the placement of experts saves when a router is skewed.

Tokens of one batch choose experts; their loads place the experts for another batch. The router
becomes skewed by ascending the load-balance loss, which training normally descends. Times are
compared with those of a router with forced balance, which gives every expert the same number of
tokens. All steps are timed in turn.

T tokens, k choices per token, E experts, P slots, M model width, n devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels.benchmarks.timing import seconds_in_turn
from kernels.experts import Settings, expert_feed_forward
from kernels.experts.slots import Slots, at_home
from lwm.config.model import PLACEMENTS, ExpertsConfig, ModelConfig
from lwm.model.experts import Experts
from lwm.model.placement import choose_slots, device_loads
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules

# This makes two chunks (`feed_forward_chunk`) per device of eight. With far fewer tokens than in
# real training, copying weights would cost as much as the products.
ROWS, LENGTH = 8, 4096
ROUNDS = 9
# The router is trained until the hottest expert has this many times the mean load.
SKEW = 10.0
# The length of a step of the router's training, in the norm over all of its weights.
STEP = 1.0
# Devices on which the recorded loads are placed, without computing anything there.
REPLAYED = 16


def measure_placement(num_devices: int = 8) -> list[dict]:
  """One record per placement of a skewed router's experts, after that of forced balance.

  Each has `hottest`, the largest load of an expert, and `imbalance`, that of a device, both divided
  by the mean; `imbalance_of_16`, if the same loads were placed on 16 devices; milliseconds of the
  layer's forward and backward pass on all devices; and milliseconds of the busiest device's
  products, computed alone. Ratios compare with forced balance.
  """
  config = ModelConfig(
    width=128,
    experts=ExpertsConfig(64, 4, width=256, placement="replicate", spare_slots=1),
    compute_dtype="float32",
  )
  experts = config.experts
  assert experts is not None
  layer = _Layer(config, num_devices)
  forced, skewed = layer.forced_params(), layer.skewed_params()
  records, steps, products = [], [], []
  for name, params in (("forced balance", forced), *((name, skewed) for name in PLACEMENTS)):
    slots, replayed = None, at_home(experts.num_experts)
    if name in PLACEMENTS and name != "home":
      placed = dataclasses.replace(experts, placement=name)
      before_E = layer.imbalance(params, 0, None)[0]
      slots, replayed = (
        jax.tree.map(
          lambda array: layer.replicated(array[0]), choose_slots(placed, before_E[None], n)
        )
        for n in (num_devices, REPLAYED)
      )
    load_E, imbalance = layer.imbalance(params, 1, slots)
    replayed_n = device_loads(load_E, replayed, REPLAYED)
    steps.append(layer.step(params, 1, slots))
    products.append(_busiest_products(config, load_E, slots, num_devices))
    records.append(
      {
        "placement": name,
        "devices": num_devices,
        "hottest": float(load_E.max() / load_E.mean()),
        "imbalance": imbalance,
        f"imbalance_of_{REPLAYED}": float(replayed_n.max() / replayed_n.mean()),
      }
    )
  for part, calls in (("step", steps), ("busiest", products)):
    taken = seconds_in_turn(calls, ROUNDS)
    for record, time in zip(records, taken):
      record |= {f"{part}_ms": time * 1e3, f"{part}_ratio": time / taken[0]}
  return records


class _Layer:
  """A layer of experts, divided over the devices, with two batches of random tokens."""

  def __init__(self, config: ModelConfig, num_devices: int):
    self._mesh = make_mesh(MeshConfig(fsdp=1, expert=num_devices), jax.devices()[:num_devices])
    rules = ShardingRules()
    with jax.set_mesh(self._mesh):
      module = Experts(config, 1, rules, nnx.Rngs(0))
      graph, state = nnx.split(module)
      self._params = jax.tree.map(lambda leaf: leaf[0], nnx.to_pure_dict(state))
      spec = rules.spec("batch", "residual", None)
    assert config.experts is not None
    E, k = config.experts.num_experts, config.experts.experts_per_token
    x_2xBxSxM = np.random.default_rng(0).standard_normal((2, ROWS, LENGTH, config.width))
    # For forced balance, the last E channels name k experts for each token, all equally often. The
    # channel before them is the same for all tokens, as the mean of real ones is not zero.
    choice = np.arange(ROWS * LENGTH * k).reshape(ROWS, LENGTH, k) % E
    x_2xBxSxM[..., -E:] = np.eye(E)[choice].sum(axis=2)
    x_2xBxSxM[..., -E - 1] = 1
    place = jax.NamedSharding(self._mesh, spec)
    self._batches = [jax.device_put(x.astype(np.float32), place) for x in x_2xBxSxM]

    def apply(params, x_BxSxM, slots):
      return nnx.merge(graph, params)(x_BxSxM, None, slots)

    def run(params, x_BxSxM, slots):
      def loss(params, x_BxSxM):
        out_BxSxM, extras = apply(params, x_BxSxM, slots)
        return jnp.sum(jnp.square(out_BxSxM)), extras

      return jax.grad(loss, (0, 1), has_aux=True)(params, x_BxSxM)

    self._apply, self._run = apply, run

  def forced_params(self) -> dict:
    """The layer's parameters with a router that reads the experts in the last channels."""
    router_MxE = np.zeros(self._params["router"].shape)
    router_MxE[-router_MxE.shape[1] :] = np.eye(router_MxE.shape[1])
    return self._with_router(router_MxE)

  def skewed_params(self) -> dict:
    """The layer's parameters with a router that is trained from a random one, see `SKEW`."""

    def balance_loss(router_MxE, params):
      _, extras = self._apply(params | {"router": router_MxE}, self._batches[0], None)
      return extras.losses["balance_loss"], jnp.sum(extras.statistics["expert_load"], axis=0)

    climb = jax.jit(jax.grad(balance_loss, has_aux=True))
    shape = self._params["router"].shape
    params = self._with_router(np.random.default_rng(1).standard_normal(shape) / shape[0] ** 0.5)
    with jax.set_mesh(self._mesh):
      gradient_MxE, load_E = climb(params["router"], params)
      while load_E.max() <= SKEW * load_E.mean():
        gradient_MxE = np.asarray(gradient_MxE)
        step_MxE = STEP * gradient_MxE / np.linalg.norm(gradient_MxE)
        params = self._with_router(np.asarray(params["router"]) + step_MxE)
        gradient_MxE, load_E = climb(params["router"], params)
    return params

  def replicated(self, array: jax.Array) -> jax.Array:
    """The array on all devices, as in training. Otherwise each step would copy it to them."""
    return jax.device_put(array, jax.NamedSharding(self._mesh, jax.P()))

  def _with_router(self, router_MxE: np.ndarray) -> dict:
    router = self._params["router"]
    return self._params | {"router": jax.device_put(router_MxE.astype(np.float32), router.sharding)}

  def imbalance(self, params: dict, batch: int, slots: Slots | None) -> tuple[jax.Array, float]:
    """Choices of each expert, [E], and the largest load of a device divided by the mean."""
    with jax.set_mesh(self._mesh):
      _, extras = jax.jit(self._run)(params, self._batches[batch], slots)
    load_E = jnp.sum(np.asarray(extras.statistics["expert_load"]), axis=0)
    return load_E, float(extras.statistics["expert_imbalance"][1])

  def step(self, params: dict, batch: int, slots: Slots | None) -> Callable[[], Any]:
    """The forward and backward pass."""

    def call():
      with jax.set_mesh(self._mesh):
        return jax.jit(self._run)(params, self._batches[batch], slots)

    return call


def _busiest_products(
  config: ModelConfig, load_E: jax.Array, slots: Slots | None, n: int
) -> Callable[[], Any]:
  """The products, forward and backward, of the device with the most rows."""
  experts = config.experts
  assert experts is not None
  if slots is None:
    slots = at_home(experts.num_experts)
  busiest = jnp.argmax(device_loads(load_E, slots, n))
  own = jax.tree.map(lambda array_P: array_P.reshape(n, -1)[busiest], slots)
  rows = np.rint(own.of_experts(load_E) * own.share_P()).astype(np.int32)
  random, e = np.random.default_rng(0), len(rows)
  shapes = (e, config.width, experts.width), (e, experts.width, config.width)
  gate, up, down = (jnp.asarray(random.standard_normal(shapes[i]), jnp.float32) for i in (0, 0, 1))
  x_RxM = jnp.asarray(random.standard_normal((rows.sum(), config.width)), jnp.float32)
  expert_Rx1 = jnp.asarray(np.repeat(np.arange(e, dtype=np.int32), rows)[:, None])
  settings = Settings(e, chunk=x_RxM.shape[0])

  # The experts of rows are an argument, because XLA would sort a constant while it compiles.
  def run(expert_Rx1, x_RxM, gate, up, down):
    def loss(x_RxM, gate, up, down):
      share_Rx1 = jnp.ones(expert_Rx1.shape)
      out_RxM, _ = expert_feed_forward(x_RxM, expert_Rx1, share_Rx1, gate, up, down, settings)
      return jnp.sum(jnp.square(out_RxM))

    return jax.grad(loss, (0, 1, 2, 3))(x_RxM, gate, up, down)

  return functools.partial(jax.jit(run), expert_Rx1, x_RxM, gate, up, down)
