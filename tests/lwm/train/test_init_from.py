"""A run that starts from another run's parameters, and one that is given more to do."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from lwm.checkpoint.reader import newest
from lwm.config.experiment import MixtureEntry
from lwm.config.validate import check_devices
from lwm.errors import ConfigError, UserError
from lwm.parallel.sharding import MeshConfig
from lwm.report.metrics import read_metrics
from lwm.train import loop
from tests.lwm.train.test_resume import final_state, steps_done


@pytest.fixture
def experiment(make_experiment):
  """Two steps of text, on a model without vision rows."""
  experiment = make_experiment()
  del experiment.stages[1:]
  experiment.stages[0].steps, experiment.stages[0].warmup_steps = 2, 1
  experiment.model.vision_vocab_size = 0
  experiment.datasets = experiment.datasets[:1]
  experiment.evaluation.every_steps = 100
  return experiment


def train(experiment, workdir: pathlib.Path, devices: int = 1) -> dict:
  """Trains, and returns the final parameters."""
  loop.train(experiment, workdir, jax.devices()[:devices])
  steps = sum(stage.steps for stage in experiment.stages)
  return final_state(workdir, steps)[0]


def with_vision(make_experiment, experiment, **model):
  """The same model with vision rows, trained with a learning rate of almost 0."""
  wide = make_experiment()
  wide.stages[1:] = []
  wide.stages[0].steps, wide.stages[0].warmup_steps = 1, 0
  wide.stages[0].mixture = [MixtureEntry("text"), MixtureEntry("video")]
  wide.optimizer = dataclasses.replace(
    wide.optimizer, schedule="constant", peak_learning_rate=1e-30, weight_decay=0.0
  )
  wide.model = dataclasses.replace(wide.model, **model)
  return wide


@pytest.mark.slow
@pytest.mark.parametrize("tied", (False, True))
def test_a_vision_model_starts_from_a_text_model(
  experiment, make_experiment, tmp_path, capsys, tied
):
  experiment.model.tied_head = tied
  text = train(experiment, tmp_path / "text")
  wide = with_vision(make_experiment, experiment, tied_head=tied, norm_epsilon=1e-6)
  wide.init_from = str(tmp_path / "text")
  # On another mesh, too.
  wide.stages[0].mesh = MeshConfig(fsdp=2, tensor=2)
  vision = train(wide, tmp_path / "vision", devices=4)
  output = capsys.readouterr().out
  assert f"initial parameters: {tmp_path}/text/checkpoints/2; they were trained with " in output
  assert "config.model.norm_epsilon=1e-05, not 1e-06; 8448 new rows for vision ids" in output
  rows = experiment.model.text_vocab_size
  np.testing.assert_array_equal(vision["embedding"][:rows], text["embedding"])
  new = vision["embedding"][rows:]
  assert np.std(new) == pytest.approx(wide.model.initializer_std, rel=0.02)
  # As drawn from the seed by a run without init_from.
  wide.init_from = ""
  random = train(wide, tmp_path / "random", devices=4)
  np.testing.assert_array_equal(new, random["embedding"][rows:])
  if not tied:
    np.testing.assert_array_equal(vision["output"][:, :rows], text["output"])
    np.testing.assert_array_equal(vision["output"][:, rows:], random["output"][:, rows:])
  jax.tree.map(np.testing.assert_array_equal, vision["blocks"], text["blocks"])


@pytest.mark.slow
def test_the_workdirs_own_checkpoint_comes_first(experiment, tmp_path):
  first = train(experiment, tmp_path / "first")
  second = dataclasses.replace(experiment, init_from=str(tmp_path / "first"))
  plain = train(second, tmp_path / "second")
  assert any(
    not np.array_equal(*pair) for pair in zip(jax.tree.leaves(first), jax.tree.leaves(plain))
  )
  # Nothing is read from there again.
  second.init_from = str(tmp_path / "gone")
  resumed = train(second, tmp_path / "second")
  jax.tree.map(np.testing.assert_array_equal, plain, resumed)


def test_what_cannot_be_started_from_is_one_sentence(experiment, make_experiment, tmp_path):
  train(experiment, tmp_path / "text")
  wide = with_vision(make_experiment, experiment, width=64)
  wide.init_from = str(tmp_path / "text")
  with pytest.raises(
    UserError, match=r"config.init_from=.*/text holds a model with config.model.width=32, not 64: "
  ):
    train(wide, tmp_path / "run")
  wide.init_from = str(tmp_path / "nothing")
  with pytest.raises(UserError, match="There is no checkpoint in .*/nothing: name the --workdir"):
    train(wide, tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_has_ended_is_given_more_steps_and_another_stage(
  experiment, make_experiment, tmp_path
):
  """It ends like a run that had them from the start."""
  experiment.optimizer.schedule = "constant"
  train(experiment, tmp_path / "run")
  before = read_metrics(tmp_path / "run" / "metrics.jsonl")
  experiment.stages[0].steps = 4
  experiment.stages.append(dataclasses.replace(experiment.stages[0], name="more", steps=2))
  extended = train(experiment, tmp_path / "run")
  planned = train(experiment, tmp_path / "planned")
  assert steps_done(tmp_path / "run") == list(range(1, 7))
  jax.tree.map(np.testing.assert_array_equal, extended, planned)
  losses = lambda records: [r["loss"] for r in records if r["kind"] == "train"]
  after = losses(read_metrics(tmp_path / "run" / "metrics.jsonl"))
  assert after[:2] == losses(before)
  assert after == losses(read_metrics(tmp_path / "planned" / "metrics.jsonl"))


def test_a_stage_that_cannot_run_is_found_before_the_first_step(make_experiment, tmp_path):
  experiment = make_experiment()
  experiment.model.vision_vocab_size = 8195
  with pytest.raises(UserError, match="has vision tokens of 8448 ids, but .* is 8195"):
    loop.train(experiment, tmp_path / "layout", jax.devices()[:1])
  experiment = make_experiment()
  experiment.datasets[1].long_documents = "leave_out"
  with pytest.raises(UserError, match="Stage 'video_128' would learn nothing from dataset 'video'"):
    loop.train(experiment, tmp_path / "empty", jax.devices()[:1])
  experiment = make_experiment()
  experiment.stages[1].mesh = MeshConfig(fsdp=1, tensor=4)
  with pytest.raises(ConfigError, match="num_kv_heads = 2 does not divide over mesh.tensor = 4"):
    check_devices(experiment, 4)
  experiment = make_experiment()
  experiment.stages[1].trainable = ["blocks.*", "heads.*"]
  with pytest.raises(ConfigError, match="stage 'video_128': 'heads.\\*' matches no parameter"):
    loop.train(experiment, tmp_path / "frozen", jax.devices()[:1])
  assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_an_item_is_one_sentence(experiment, tmp_path):
  train(experiment, tmp_path / "run")
  checkpoint = tmp_path / "run" / "checkpoints" / "2"
  # As the directory of checkpoints, and as a checkpoint.
  for path in (checkpoint.parent, checkpoint):
    assert newest(path).position.total_steps == 2
  # Of an older version, which had no digests, and copied in part.
  (checkpoint / "digests.json").unlink()
  shutil.rmtree(checkpoint / "config")
  other = dataclasses.replace(experiment, init_from=str(checkpoint))
  with pytest.raises(UserError, match=r"checkpoints/2 is damaged \(config\): restore it"):
    train(other, tmp_path / "other")
