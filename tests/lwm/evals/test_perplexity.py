"""Perplexity against the training loss, and the cost of rounding a trained model's weights."""

import dataclasses
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from kernels.ring import Layout
from lwm import model as model_lib
from lwm.config.experiment import LossConfig
from lwm.evals import perplexity
from lwm.evals.perplexity import _CHUNK
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules
from tests import programs


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
def test_rounding_costs_a_trained_model_little(undisturbed, tmp_path):
  """The program, on new sentences for the tiny run, which has learnt what its words are."""
  generator = random.Random(7)
  words = ["the", "cat", "dog", "sees", "a", "red", "house", "and", "runs", "1", "2", "3"]
  (tmp_path / "text.txt").write_text(" ".join(generator.choice(words) for _ in range(300)))
  forms = {"float32": 0, "bfloat16": 0.005, "int8": 0.005, "int8_32": 0.005, "int4": 0.04}
  arguments = [f"--workdir={undisturbed}", f"--text={tmp_path / 'text.txt'}", "--tokens=200"]
  process = programs.run("experiments.perplexity", *arguments, f"--weights={','.join(forms)}")
  assert process.returncode == 0, process.stderr
  found = re.findall(r"(\w+): ([\d.]+) MiB of weights, perplexity ([\d.]+)", process.stdout)
  sizes = {form: float(size) for form, size, _ in found}
  values = {form: float(value) for form, _, value in found}
  assert list(values) == list(forms) and values["float32"] < 40
  for form, most in forms.items():
    assert values[form] == pytest.approx(values["float32"], rel=most)
  assert sizes["int4"] <= sizes["int8"] < 0.7 * sizes["bfloat16"] < 0.4 * sizes["float32"]

  for flag, message in (
    ("--weights=int3", "--weights=int3: the forms are float32, bfloat16, int8"),
    ("--start=900", "tokens from --start=900 on, fewer than --tokens=200"),
  ):
    process = programs.run("experiments.perplexity", *arguments, flag)
    assert process.returncode == 1 and message in process.stderr
