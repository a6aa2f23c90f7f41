"""A vocabulary that does not divide over the mesh gets padded tables; nothing else changes."""

import dataclasses

import jax
import numpy as np
import pytest

from lwm import data
from lwm.config.experiment import Experiment
from lwm.errors import ConfigError
from lwm.infer import load_trained
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.report.metrics import read_metrics
from lwm.train import loop
from tests.lwm.train.test_resume import final_state

# On two devices along `tensor`, then on four.
MESHES = (MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=1, tensor=4))


@pytest.fixture
def experiment(make_experiment, tmp_path) -> Experiment:
  """Four steps of text in 321 pieces, with a checkpoint after two."""
  sentences = [f"the cat number {n} sees a red house and runs {n % 7} times" for n in range(80)]
  tokenizer = tmp_path / "tokenizer.model"
  data.train_sentencepiece(sentences, tokenizer, 321)
  with data.DatasetWriter(tmp_path / "odd", data.load_tokenizer(tokenizer)) as writer:
    for sentence in sentences:
      writer.write("train", data.text_document(data.load_tokenizer(tokenizer), sentence))
  experiment = make_experiment()
  del experiment.stages[1:], experiment.datasets[1:]
  experiment.tokenizer, experiment.datasets[0].path = str(tokenizer), str(tmp_path / "odd")
  experiment.model = dataclasses.replace(
    experiment.model, text_vocab_size=321, vision_vocab_size=0, num_kv_heads=4
  )
  experiment.stages[0].steps = 4
  experiment.checkpoint.every_steps, experiment.evaluation.every_steps = 2, 100
  return experiment


def losses(workdir) -> list[float]:
  return [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.slow
def test_padding_changes_nothing(experiment, tmp_path):
  # Scales of int8 moments belong to groups of ids, which padding could change.
  experiment.optimizer.moment_dtype = "int8"
  # The two halves below are two runs of different lengths, to which other schedules would adapt.
  experiment.optimizer.schedule = "constant"
  loop.train(experiment, tmp_path / "one", jax.devices()[:1])
  whole = final_state(tmp_path / "one", 4)[0]
  assert whole["embedding"].shape == (321, 32) and whole["output"].shape == (32, 321)
  # Half of the run with 322 ids, and the other half with 324.
  for steps, mesh, ids in zip((2, 4), MESHES, (322, 324)):
    stage = dataclasses.replace(experiment.stages[0], steps=steps, mesh=mesh, warmup_steps=2)
    part = dataclasses.replace(experiment, stages=[stage])
    loop.train(part, tmp_path / "padded", jax.devices()[:4])
    padded = final_state(tmp_path / "padded", steps)[0]
    assert padded["embedding"].shape == (ids, 32) and padded["output"].shape == (32, ids)
    assert not padded["embedding"][321:].any() and not padded["output"][:, 321:].any()
  np.testing.assert_allclose(losses(tmp_path / "padded"), losses(tmp_path / "one"), rtol=1e-4)

  # A sampler has no padding.
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
    trained = load_trained(tmp_path / "padded")
  np.testing.assert_array_equal(trained.params["embedding"], padded["embedding"][:321])


def test_logits_of_padding_are_never_the_largest(experiment):
  from lwm import model as model_lib

  config = dataclasses.replace(experiment.model, vocab_multiple=64)
  with jax.set_mesh(make_mesh(MESHES[0], jax.devices()[:4])):
    model = model_lib.build(config)
    params = jax.jit(model.init)(jax.random.key(0))
    hidden = jax.numpy.ones((4, 2, 32))
    logits = np.asarray(jax.jit(model.logits)(params, hidden))
  assert logits.shape[-1] == 384 and np.isneginf(logits[..., 321:]).all()
  assert np.isfinite(logits[..., :321]).all()


def test_a_multiple_that_does_not_divide_is_one_sentence(experiment, tmp_path):
  experiment.model.vocab_multiple = 107
  experiment.stages[0].mesh = MESHES[0]
  message = "config.model.vocab_multiple=107 = 321 does not divide over mesh.tensor = 2"
  with pytest.raises(ConfigError, match=message):
    loop.train(experiment, tmp_path / "run", jax.devices()[:4])
