"""Layers in several stretches, and what blocks report in addition to their output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kernels.ring import Layout
from lwm.config.experiment import LossConfig
from lwm.config.model import Stretch
from lwm.errors import ConfigError
from lwm.model import block, build
from lwm.model.extras import Extras
from lwm.parallel.sharding import ShardingRules
from lwm.program.objective import Objective
from lwm.program.state import TrainState
from lwm.program.step import train_step

STRETCHES = [Stretch("dense", 1), Stretch("dense", 2)]


def batch_of(tiny):
  rng = np.random.default_rng(1)
  return tiny.pack([[tiny.document(rng, 9, 0), tiny.document(rng, 11, 1)] for _ in range(4)], 24)


def in_stretches(params):
  """Parameters of one stretch of three layers, as those of STRETCHES."""
  blocks = params["blocks"]
  return params | {
    "blocks": jax.tree.map(lambda leaf: leaf[:1], blocks),
    "blocks_1": jax.tree.map(lambda leaf: leaf[1:], blocks),
  }


@pytest.fixture(scope="module")
def of_one_stretch(tiny):
  """The parameters of three layers, their losses and their gradients, on one device."""
  config = tiny.config(num_layers=3)
  params = tiny.init(build(config), tiny.mesh())
  return params, *tiny.loss_and_gradients(config, tiny.mesh(), "contiguous", batch_of(tiny))


@pytest.mark.slow
@pytest.mark.parametrize(
  "sizes,changes",
  [
    ({}, dict(remat="full")),
    ({}, dict(remat="none", head_groups=2)),
    (dict(fsdp=2, ring=2, ulysses=2), dict(remat="offload_attention")),
  ],
  ids=str,
)
def test_two_stretches_equal_one(tiny, of_one_stretch, sizes, changes):
  params, sums, gradients = of_one_stretch
  actual = tiny.loss_and_gradients(
    tiny.config(num_layers=3, stretches=STRETCHES, **changes),
    tiny.mesh(**sizes),
    "zigzag" if sizes else "contiguous",
    batch_of(tiny),
    params=in_stretches(params),
  )
  tiny.assert_close(actual, (sums, in_stretches(gradients)), 1e-5)


@pytest.mark.slow
def test_two_stretches_decode_like_one(tiny):
  config = tiny.config(num_layers=3)
  mesh, rules = tiny.mesh(), ShardingRules(sequence=None)
  one = build(config, rules)
  two = build(dataclasses.replace(config, stretches=STRETCHES), rules)
  tokens = np.random.default_rng(0).integers(0, 64, (2, 7)).astype(np.int32)
  with jax.set_mesh(mesh):
    params = tiny.init(one, mesh)
    logits = []
    for model, own in ((one, params), (two, in_stretches(params))):
      decode = tiny.jit(
        lambda params, tokens, cache, model=model: model.decode(
          params, tokens, cache, rope_theta=tiny.rope_theta
        )
      )
      _, cache = decode(own, tokens[:, :5], model.init_cache(2, 8))
      for column in (5, 6):
        last, cache = decode(own, tokens[:, column : column + 1], cache)
      logits.append(np.asarray(last))
  np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-6)


def test_an_unknown_kind_is_named(tiny):
  config = tiny.config(num_layers=2, stretches=[Stretch("dense", 1), Stretch("sparse", 1)])
  with pytest.raises(ConfigError, match=r"stretches\[1\].kind='sparse' must be one of 'dense'"):
    build(config)


class Reporting(block.Block):
  """Leaves the residual stream alone; reports strength^2 / 2 x its mean square, and its sizes."""

  def __init__(self, config, num_layers, rules, rngs):
    self.strength = nnx.Param(jnp.arange(1.0, num_layers + 1), logical_axes=("layers",))

  def __call__(self, x_BxSxM, *_):
    square_BxSxM = jnp.square(x_BxSxM)
    loss = 0.5 * jnp.square(self.strength[...]) * jnp.mean(square_BxSxM)
    statistics = {"channel_square": jnp.mean(square_BxSxM, axis=(0, 1))}
    return x_BxSxM, None, Extras({"size_loss": loss}, statistics)


@pytest.mark.slow
@pytest.mark.parametrize(
  "sizes,accumulation_steps,remat",
  [
    ({}, 1, "none"),
    ({}, 2, "full"),
    (dict(fsdp=2, ring=2, tensor=2), 1, "full"),
    (dict(fsdp=2, ring=2, ulysses=2), 2, "attention"),
  ],
  ids=str,
)
def test_what_blocks_report_reaches_loss_gradients_and_metrics(
  tiny, monkeypatch, sizes, accumulation_steps, remat
):
  """The first three layers leave the embeddings alone, so that NumPy knows what they report."""
  monkeypatch.setitem(block.KINDS, "reporting", Reporting)
  stretches = [Stretch("reporting", 2), Stretch("reporting", 1), Stretch("dense", 1)]
  config = tiny.config(num_layers=4, stretches=stretches, remat=remat)
  mesh, model = tiny.mesh(**sizes), build(config)
  layout = Layout("zigzag", mesh.shape["ring"])
  objective = Objective(model, LossConfig(), tiny.rope_theta, layout, accumulation_steps)
  batch = batch_of(tiny)

  @tiny.jit
  def step(params, batch):
    optimizer = optax.sgd(1.0)
    state = TrainState(params, optimizer.init(params), jnp.int32(0))
    state, metrics = train_step(
      state, batch, objective=objective, optimizer=optimizer, learning_rate=jnp.float32
    )
    return jax.tree.map(jnp.subtract, params, state.params), metrics

  with jax.set_mesh(mesh):
    params = tiny.init(model, mesh)
    silent = params | {
      name: {"strength": jnp.zeros_like(params[name]["strength"])}
      for name in ("blocks", "blocks_1")
    }
    rows = tiny.place(batch, layout, mesh, model.rules)
    (gradients, metrics), (silent_gradients, silent_metrics) = jax.tree.map(
      np.asarray, (step(params, rows), step(silent, rows))
    )
  embedding_VxM = np.asarray(params["embedding"])
  embedded_BxSxM = embedding_VxM[batch["tokens"]]
  mean_square = np.square(embedded_BxSxM).mean()
  strengths = np.array([1, 2, 1])
  expected = (strengths**2 / 2).sum() * mean_square

  np.testing.assert_allclose(metrics["size_loss"], expected, rtol=1e-5)
  cross_entropy = (metrics["text_loss"] + metrics["vision_loss"]) / 2
  np.testing.assert_allclose(metrics["loss"], cross_entropy + expected, rtol=1e-5)
  np.testing.assert_allclose(silent_metrics["loss"], cross_entropy, rtol=1e-5)
  channel_M = np.square(embedded_BxSxM).mean(axis=(0, 1))
  np.testing.assert_allclose(metrics["channel_square"], np.stack([channel_M] * 3), rtol=1e-5)

  strength_gradients = [gradients[name]["strength"] for name in ("blocks", "blocks_1")]
  np.testing.assert_allclose(np.concatenate(strength_gradients), strengths * mean_square, rtol=1e-4)
  count_V = np.bincount(batch["tokens"].ravel(), minlength=config.vocab_size)
  share_Vx1 = (strengths**2).sum() * (count_V / embedded_BxSxM.size)[:, None]
  np.testing.assert_allclose(
    gradients["embedding"] - silent_gradients["embedding"], share_Vx1 * embedding_VxM, atol=1e-6
  )
