"""Perplexity against the training loss, and what rounding the weights of a trained model costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from kernels.ring import Layout
from lwm import data, infer, model as model_lib
from lwm.config.experiment import LossConfig
from lwm.evals import perplexity
from lwm.evals.perplexity import _CHUNK
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules


@pytest.fixture(autouse=True)
def mesh():
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])) as mesh:
    yield mesh


@pytest.mark.parametrize("length", (3, _CHUNK + 1, _CHUNK + 2))
def test_equals_the_training_loss(length):
  config = dataclasses.replace(models.debug(text_vocab_size=320), num_layers=1)
  model = model_lib.build(config, ShardingRules(sequence=None))
  params = jax.jit(model.init)(jax.random.key(0))
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 320, length), jnp.int32)
  positions = jnp.arange(length - 1, dtype=jnp.int32)[None]
  batch = {
    "tokens": tokens[None, :-1],
    "targets": tokens[None, 1:],
    "positions": positions,
    "key_start": jnp.zeros_like(positions),
    "key_stop": positions + 1,
    "modality": jnp.zeros_like(positions),
    "loss_weights": jnp.ones(positions.shape, jnp.float32),
  }
  training = model_lib.build(config)

  @jax.jit
  def nll(params, batch):
    sums = training.losses(
      params, batch, rope_theta=1e4, layout=Layout("contiguous", 1), loss=LossConfig()
    )
    return jnp.sum(sums.nll) / (length - 1)

  expected = np.exp(nll(params, batch))
  assert perplexity(model, params, tokens, rope_theta=1e4) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_rounding_costs_a_trained_model_little(undisturbed, prepared):
  """On held-out text of the tiny run; a random model would lose as little, so loss must be low."""
  values = {}
  for form in infer.FORMS:
    if form in ("int4_64", "int4_128"):  # The tiny model's widths have no such groups.
      continue
    trained = infer.load_trained(undisturbed, form)
    dataset = data.Dataset(prepared / "text").split(data.VALIDATION)
    tokens, _ = dataset.read(0, 0, int(dataset.lengths[0]))
    values[form] = perplexity(
      trained.model, trained.params, jnp.asarray(tokens), rope_theta=trained.rope_theta
    )
  assert values["float32"] < 40
  for form, most in (("bfloat16", 0.005), ("int8", 0.005), ("int8_32", 0.005), ("int4", 0.04)):
    assert values[form] == pytest.approx(values["float32"], rel=most)
