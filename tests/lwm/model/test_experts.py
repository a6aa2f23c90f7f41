"""A layer of experts against a loop over tokens: results, every gradient, losses and loads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from kernels.attention import KeyIntervals
from kernels.experts.slots import divided
from kernels.ring import Layout
from lwm.config.experiment import LossConfig
from lwm.config.model import ExpertsConfig
from lwm.model import build
from lwm.model.experts import PADDING, Experts
from lwm.model.placement import num_devices
from lwm.parallel.sharding import ShardingRules
from lwm.program.objective import Objective
from lwm.program.optimizer import kept_unless_applied
from lwm.program.state import TrainState
from lwm.program.step import train_step
from lwm.program.trainable import Trainable

ROWS, LENGTH, WIDTH, E, K = 8, 16, 16, 32, 3
SOFTMAX = ExpertsConfig(E, K, width=10)
SIGMOID = ExpertsConfig(E, K, width=10, shared_experts=2, router="sigmoid", scale=2.5)


def model_config(tiny, experts):
  return tiny.config(width=WIDTH, experts=experts, feed_forward_chunk=6, num_layers=1)


@functools.cache
def inputs():
  """x, modality and cotangent. A third of the tokens is padding, which must not count."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
  x[..., -1] = 3
  modality = rng.integers(PADDING, 2, (ROWS, LENGTH)).astype(np.int32)
  return x, modality, rng.normal(size=x.shape).astype(np.float32)


def parameters(tiny, experts, skew):
  """Of one layer; with `skew`, most tokens choose expert 1, and experts from 20 on are empty."""
  rules = ShardingRules()
  with jax.set_mesh(tiny.mesh()):
    layer = Experts(model_config(tiny, experts), 1, rules, nnx.Rngs(0))
    params = jax.tree.map(lambda leaf: np.array(leaf[0]), nnx.to_pure_dict(nnx.state(layer)))
  if "router_bias" in params:
    rng = np.random.default_rng(1)
    params["router_bias"] = rng.normal(0, 0.2, E).astype(np.float32)
    if skew:
      params["router_bias"][1] += 5
      params["router_bias"][20:] -= 5
  elif skew:
    # The last channel is the same in all tokens.
    params["router"][-1] = 0
    params["router"][-1, 1] = 1
    params["router"][-1, 20:] = -3
  return params


def placements(n, spare):
  """Slots with copies of the hottest expert on all devices, and with moved experts."""
  rng = np.random.default_rng(2)
  home_nxe = np.arange(E).reshape(n, -1)
  copied, moved = np.full((2, n, spare), E)
  moved_home = home_nxe.copy()
  copied[1:, 0] = 1
  for device in range(n):
    others = rng.permutation(home_nxe[np.arange(n) != device].reshape(-1))
    copied[device, 1:] = others[others != 1][: spare - 1]
    moved[device, 0] = home_nxe[device - 1, 1]
    moved_home[device - 1, 1] = E
  pairs = (home_nxe, copied), (moved_home, moved)
  experts = [np.concatenate(pair, axis=1).reshape(-1).astype(np.int32) for pair in pairs]
  # Copies divide the tokens of their expert in unequal parts.
  return [divided(jnp.asarray(own_P), 1 + jnp.arange(own_P.size) % 3, E) for own_P in experts]


def run_layer(tiny, experts, rules, mesh, params, slots):
  """out, gradients of x and parameters, losses and statistics, of the layer on a mesh.

  One result for each array of `slots`.
  """
  x, modality, cotangent = inputs()

  with jax.set_mesh(mesh):
    module = nnx.eval_shape(lambda: Experts(model_config(tiny, experts), 1, rules, nnx.Rngs(0)))
    graph, state = nnx.split(module)
    axes = nnx.to_pure_dict(
      jax.tree.map(
        lambda variable: variable.get_metadata("logical_axes")[1:],
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
      )
    )
    params = jax.device_put(params, rules.tree_shardings(axes, mesh))

    def loss(params, x, modality, cotangent, slots):
      out, extras = nnx.merge(graph, params)(x, modality, slots)
      return jnp.sum(out * cotangent) + sum(extras.losses.values()), (out, extras)

    # Samplers keep sequences whole, and have no backward pass.
    run = jax.grad(loss, (0, 1), has_aux=True) if rules.sequence else lambda *a: (None, loss(*a)[1])

    rows = rules.spec("batch", "residual", None)
    place = lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec))
    arrays = (
      params,
      place(x, rows),
      place(modality, rules.spec("batch", "residual")),
      place(cotangent, rows),
    )
    run = tiny.jit(run)
    for own in slots:
      gradients, (out, extras) = run(*arrays, own)
      yield jax.tree.map(np.asarray, (out, gradients, extras))


def loop_over_tokens(experts, params):
  """What `run_layer` returns, in float64, from a function of one token."""
  x, modality, cotangent = inputs()
  is_token = jnp.asarray(modality.reshape(-1) != PADDING)
  exact = functools.partial(jnp.dot, precision="highest")

  def swiglu(x_M, gate, up, down):
    return exact(jax.nn.silu(exact(x_M, gate)) * exact(x_M, up), down)

  def one_token(params, x_M):
    logits_E = exact(x_M, params["router"])
    if experts.router == "softmax":
      score_E = probability_E = jnp.exp(logits_E) / jnp.exp(logits_E).sum()
      order_E = jnp.argsort(-score_E)
    else:
      score_E = 1 / (1 + jnp.exp(-logits_E))
      probability_E = score_E / score_E.sum()
      order_E = jnp.argsort(-(score_E + params["router_bias"]))
    total = score_E[order_E[:K]].sum()
    out_M = jnp.zeros(WIDTH)
    for e in order_E[:K]:
      weights = (params[f"expert_{name}"][e] for name in ("gate", "up", "down"))
      out_M += experts.scale * score_E[e] / total * swiglu(x_M, *weights)
    chosen_E = jnp.zeros(E).at[order_E[:K]].set(1)
    square = jnp.log(jnp.exp(logits_E).sum()) ** 2
    return out_M, (chosen_E, probability_E, square)

  def loss(params, x):
    x_TxM = x.reshape(-1, WIDTH)
    out, (chosen, probability, square) = jax.vmap(one_token, (None, 0))(params, x_TxM)
    out = jnp.where(is_token[:, None], out, 0)
    if experts.shared_experts:
      shared = params["shared"]
      out += jax.vmap(lambda x_M: swiglu(x_M, shared["gate"], shared["up"], shared["down"]))(x_TxM)
    n = is_token.sum()
    mean = lambda value: jnp.where(is_token[:, None], value, 0).sum(axis=0) / n
    balance = experts.balance_loss * E * (mean(chosen) / K * mean(probability)).sum()
    z_loss = experts.router_z_loss * mean(square[:, None])[0]
    load = jnp.stack([chosen[modality.reshape(-1) == m].sum(axis=0) for m in (0, 1)])
    total = (out.reshape(x.shape) * cotangent).sum() + balance + z_loss
    return total, (out.reshape(x.shape), balance, z_loss, load)

  with jax.enable_x64(True):
    (_, (out, balance, z_loss, load)), gradients = jax.jit(
      jax.value_and_grad(loss, (0, 1), has_aux=True)
    )(jax.tree.map(jnp.float64, params), jnp.float64(x))
  extras = ({"balance_loss": balance, "router_z_loss": z_loss}, load)
  return jax.tree.map(np.asarray, (out, gradients, extras))


def assert_close(actual, expected, tolerance=1e-5):
  """Each expert's deviation counts, relative to that expert's largest gradient."""
  (out, gradients, extras), (expected_out, expected_gradients, (losses, load)) = actual, expected
  assert largest(out, expected_out) < tolerance
  for name, value in losses.items():
    np.testing.assert_allclose(extras.losses[name], value, rtol=1e-5)
  np.testing.assert_array_equal(extras.statistics["expert_load"], load)
  if gradients is None:
    return
  (gradients, x_gradient), (wanted, wanted_x_gradient) = gradients, expected_gradients
  assert largest(x_gradient, wanted_x_gradient) < tolerance
  gradients, wanted = by_expert(gradients), by_expert(wanted)
  assert not gradients.pop("router_bias", np.zeros(1)).any()
  for name, gradient in gradients.items():
    # Float32 rounds sums of large terms by more than 1e-8.
    rounding = 1e-8 * np.abs(wanted[name]).max()
    for e, own in enumerate(wanted[name]):
      assert np.abs(gradient[e] - own).max() <= tolerance * np.abs(own).max() + rounding, (name, e)


def by_expert(gradients):
  """The gradients, with experts first; arrays of other parameters count as one expert."""
  shared = {f"shared_{name}": array[None] for name, array in gradients.get("shared", {}).items()}
  own = {name: array for name, array in gradients.items() if name != "shared"}
  return own | shared | {"router": gradients["router"].T}


def largest(actual, expected):
  scale = np.abs(expected).max()
  return np.abs(actual - expected).max() / scale if scale else np.abs(actual).max()


@pytest.fixture(scope="module")
def expected(tiny):
  return functools.cache(
    lambda router, skew: (
      params := parameters(tiny, CONFIGS[router], skew),
      loop_over_tokens(CONFIGS[router], params),
    )
  )


CONFIGS = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
# The last one is the number of spare slots per device; 0: all experts are at home.
CASES = [
  ("softmax", False, {}, {}, 0),
  ("sigmoid", False, dict(expert=2, ring=2, tensor=2), {}, 3),
  ("softmax", True, dict(fsdp=2, expert=2, ulysses=2), {}, 2),
  ("softmax", False, dict(expert=8), {}, 0),
  ("sigmoid", True, dict(expert=8), {}, 1),
  ("sigmoid", True, dict(fsdp=2, ring=2, tensor=2), dict(experts=("expert", "ring", "tensor")), 1),
  (
    "sigmoid",
    True,
    dict(expert=2, ulysses=2, tensor=2),
    dict(sequence=None, experts=("expert", "ulysses", "tensor")),
    2,
  ),
]


@pytest.mark.parametrize("router, skew, sizes, rules, spare", CASES, ids=str)
def test_layer_equals_a_loop_over_tokens(tiny, expected, router, skew, sizes, rules, spare):
  params, wanted = expected(router, skew)
  load_E = wanted[2][1].sum(axis=0)
  if skew:
    assert load_E.max() > 10 * load_E.mean() and not load_E[20:].any()
  mesh, rules = tiny.mesh(**{"fsdp": 1, **sizes}), ShardingRules(**rules)
  with jax.set_mesh(mesh):
    slots = placements(num_devices(rules), spare) if spare else [None]
  for actual in run_layer(tiny, CONFIGS[router], rules, mesh, params, slots):
    assert_close(actual, wanted)


def decoder_config(tiny, **changes):
  experts = ExpertsConfig(
    4, 2, 16, shared_experts=1, router="sigmoid", balance_loss=0.1, router_z_loss=0.1, bias_rate=0.1
  )
  return tiny.config(experts=experts, **changes)


def batch_of(tiny):
  rng = np.random.default_rng(1)
  return tiny.pack([[tiny.document(rng, 9, 0), tiny.document(rng, 11, 1)] for _ in range(4)], 24)


def step_on(tiny, sizes, batch, **changes):
  """What a step with SGD of rate 1 adds to the parameters, and its metrics."""
  mesh, model = tiny.mesh(**{"fsdp": 1, **sizes}), build(decoder_config(tiny, **changes))
  layout = Layout("zigzag", mesh.shape["ring"])
  names = frozenset(traverse_util.flatten_dict(model.logical_axes, sep="."))
  trainable = Trainable(names - {"blocks.feed_forward.router_bias"})
  objective = Objective(model, LossConfig(), tiny.rope_theta, layout, 1, trainable)

  @tiny.jit
  def step(params, batch):
    optimizer = kept_unless_applied(optax.sgd(1.0))
    state = TrainState(params, optimizer.init(trainable.split(params)[0]), jnp.int32(0))
    state, metrics = train_step(
      state, batch, objective=objective, optimizer=optimizer, learning_rate=jnp.float32
    )
    return jax.tree.map(jnp.subtract, state.params, params), metrics

  with jax.set_mesh(mesh):
    params = tiny.init(model, mesh)
    return jax.tree.map(np.asarray, step(params, tiny.place(batch, layout, mesh, model.rules)))


@pytest.fixture(scope="module")
def one_device(tiny):
  return step_on(tiny, {}, batch_of(tiny), remat="none")


@pytest.mark.slow
def test_updates_losses_and_loads_equal_one_device(tiny, one_device):
  sizes = dict(expert=2, ring=2, tensor=2)
  updates, metrics = step_on(tiny, sizes, batch_of(tiny), remat="full")
  np.testing.assert_array_equal(metrics["expert_load"], one_device[1]["expert_load"])
  for name in ("loss", "text_loss", "vision_loss", "balance_loss", "router_z_loss"):
    np.testing.assert_allclose(metrics[name], one_device[1][name], rtol=1e-5)
  tiny.assert_close(updates, one_device[0], 2e-5)


def test_loads_count_tokens_and_biases_follow_them(tiny, one_device):
  updates, metrics = one_device
  # Four rows with 9 tokens of text and 11 of vision, 2 experts each; the rest is padding.
  assert metrics["expert_load"].shape == (2, 2, 4)
  np.testing.assert_array_equal(metrics["expert_load"].sum(axis=2), [[72, 88]] * 2)
  load_LxE = metrics["expert_load"].sum(axis=1)
  np.testing.assert_allclose(
    updates["blocks"]["feed_forward"]["router_bias"],
    0.1 * np.sign(load_LxE.mean(axis=1, keepdims=True) - load_LxE),
    rtol=1e-6,
  )


@pytest.mark.slow
def test_auxiliary_losses_reach_every_router_through_the_scan(tiny):
  """No target has a weight, so that nothing else has a gradient."""
  batch = batch_of(tiny)
  batch["loss_weights"][:] = 0
  updates, metrics = step_on(tiny, {}, batch, remat="none")
  np.testing.assert_allclose(metrics["loss"], metrics["balance_loss"] + metrics["router_z_loss"])
  assert metrics["balance_loss"] > 0 and metrics["router_z_loss"] > 0
  router_LxExM = np.moveaxis(updates["blocks"]["feed_forward"]["router"], 2, 1)
  assert np.abs(router_LxExM).max(axis=2).min() > 1e-6
  assert not updates["output"].any()


@pytest.mark.slow
def test_decoding_equals_reading_at_once(tiny):
  config = decoder_config(tiny, remat="none")
  tokens = np.random.default_rng(0).integers(0, 64, (2, 7)).astype(np.int32)
  whole, mesh = build(config), tiny.mesh()
  with jax.set_mesh(mesh):
    start = jnp.zeros((2, 7), jnp.int32)
    intervals = KeyIntervals(start, start + jnp.arange(1, 8)[None])

    @tiny.jit
    def read(params, tokens):
      hidden = whole.hidden(
        params,
        tokens,
        start + jnp.arange(7)[None],
        intervals,
        rope_theta=tiny.rope_theta,
        layout=Layout("contiguous", 1),
      )
      return whole.logits(params, hidden)

    expected = np.asarray(read(tiny.init(whole, mesh), tokens))
  mesh, model = tiny.mesh(expert=2, tensor=2), build(config, ShardingRules(sequence=None))
  with jax.set_mesh(mesh):
    params = tiny.init(model, mesh)
    decode = tiny.jit(
      lambda params, tokens, cache: model.decode(params, tokens, cache, rope_theta=tiny.rope_theta)
    )
    logits, cache = decode(params, tokens[:, :6], model.init_cache(2, 8))
    last, _ = decode(params, tokens[:, 6:], cache)
  np.testing.assert_allclose(logits, expected[:, 5], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(last, expected[:, 6], rtol=1e-4, atol=1e-5)
