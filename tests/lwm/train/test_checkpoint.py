import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from lwm.errors import UserError
from lwm.experiment import Experiment
from lwm.experiment import MeshConfig
from lwm.experiment import Stage
from lwm.train.checkpoint import Checkpoints
from lwm.train.checkpoint import Progress
from lwm.train.identity import Identity
from lwm.train.identity import first_difference
from lwm.train.program import build_program

PROGRESS = Progress(stage=0, step=5, total_steps=5)


@pytest.fixture
def identity(experiment):
  return Identity(experiment, b"pieces", {"text": "abc", "video": "def"})


def state_on(experiment, mesh, devices=None):
  """A program, and a state of random parameters and moments."""
  stage = experiment.stages[0]
  stage.mesh = mesh
  program = build_program(experiment, stage, devices)
  with jax.set_mesh(program.mesh):
    state = program.fresh_state(program.initial_params(3))
    moments = jax.tree.map(lambda leaf: leaf + 1, state.optimizer_state)
  return program, state._replace(optimizer_state=moments)


def save(directory: pathlib.Path, identity, state, *steps, keep=2):
  checkpoints = Checkpoints(directory, keep)
  for step in steps:
    checkpoints.save(state, dataclasses.replace(PROGRESS, step=step, total_steps=step), identity)
  checkpoints.close()


def assert_same(left, right):
  for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_restores_bit_for_bit_onto_another_mesh(experiment, identity, tmp_path):
  _, state = state_on(experiment, MeshConfig(fsdp=1), jax.devices()[:1])
  save(tmp_path, identity, state, 5)
  program, _ = state_on(experiment, MeshConfig(data=1, fsdp=2, ring=2, tensor=2))
  checkpoints = Checkpoints(tmp_path, 2)
  # The mesh is free to change.
  assert checkpoints.latest(dataclasses.replace(identity, experiment=experiment)) == (PROGRESS, [])
  restored = checkpoints.restore(PROGRESS, program.state)
  checkpoints.close()
  assert_same(restored.params, state.params)
  assert_same(restored.optimizer_state, state.optimizer_state)
  assert restored.step == 5
  for leaf, abstract in zip(jax.tree.leaves(restored), jax.tree.leaves(program.state)):
    assert leaf.sharding == abstract.sharding and leaf.dtype == abstract.dtype


def test_a_step_that_overwrites_the_state_cannot_reach_the_checkpoint(
    experiment, identity, tmp_path
):
  """On CPU a copy to the host is a view; the donated buffers must not be written under it."""
  program, state = state_on(experiment, MeshConfig())
  before = jax.tree.map(np.array, state.params)
  checkpoints = Checkpoints(tmp_path, 2)
  overwrite = jax.jit(lambda params: jax.tree.map(lambda leaf: 0 * leaf, params), donate_argnums=0)
  checkpoints.save(state, PROGRESS, identity)
  overwritten = jax.block_until_ready(overwrite(state.params))
  restored = checkpoints.restore(PROGRESS, program.state)
  checkpoints.close()
  assert_same(restored.params, before)
  assert not np.any(jax.tree.leaves(overwritten)[0])


def test_keeps_the_newest(experiment, identity, tmp_path):
  _, state = state_on(experiment, MeshConfig())
  save(tmp_path, identity, state, 1, 2, 3)
  assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["2", "3"]


def test_an_incomplete_checkpoint_is_ignored_and_removed(experiment, identity, tmp_path):
  _, state = state_on(experiment, MeshConfig())
  save(tmp_path, identity, state, 5)
  incomplete = tmp_path / "9.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "5", incomplete)
  shutil.rmtree(incomplete / "params")
  checkpoints = Checkpoints(tmp_path, 2)
  assert checkpoints.latest(identity) == (PROGRESS, [])
  # The broom runs in the background, but no later than the next save.
  checkpoints.save(state, dataclasses.replace(PROGRESS, step=6, total_steps=6), identity)
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["5", "6"]


def test_holds_config_and_tokenizer(experiment, identity, tmp_path):
  _, state = state_on(experiment, MeshConfig())
  save(tmp_path, identity, state, 5)
  assert (tmp_path / "5" / "tokenizer" / "tokenizer.model").read_bytes() == b"pieces"
  config = json.loads((tmp_path / "5" / "config" / "metadata").read_text())
  assert config == dataclasses.asdict(experiment)


def test_no_checkpoint_is_a_fresh_start(identity, tmp_path):
  checkpoints = Checkpoints(tmp_path, 2)
  assert checkpoints.latest(identity) == (None, [])
  checkpoints.close()


def test_another_run_is_refused_in_one_sentence(experiment, identity, tmp_path):
  directory = tmp_path / "run" / "checkpoints"
  _, state = state_on(experiment, MeshConfig())
  save(directory, identity, state, 5)
  checkpoints = Checkpoints(directory, 2)

  other = dataclasses.replace(
      experiment, optimizer=dataclasses.replace(experiment.optimizer, beta1=0.5)
  )
  with pytest.raises(UserError) as error:
    checkpoints.latest(dataclasses.replace(identity, experiment=other))
  assert str(error.value) == (
      f"{tmp_path}/run holds a run with config.optimizer.beta1=0.9, not 0.5: set it back, or start "
      "anew with another --workdir."
  )
  with pytest.raises(UserError, match="another tokenizer than .*tokenizer.model: set it back"):
    checkpoints.latest(dataclasses.replace(identity, tokenizer=b"other"))
  with pytest.raises(UserError, match="dataset 'video' as it was before"):
    checkpoints.latest(dataclasses.replace(identity, manifests={"text": "abc", "video": "new"}))
  checkpoints.close()


def difference(change) -> str | None:
  stored, current = (
      Experiment(stages=[Stage(name="a"), Stage(name="b")]) for _ in range(2)
  )
  change(current)
  stored = json.loads(json.dumps(dataclasses.asdict(stored)))
  return first_difference(stored, dataclasses.asdict(current))


def test_what_may_change():
  def change(experiment):
    experiment.name = "renamed"
    experiment.tokenizer = "moved/tokenizer.model"
    experiment.checkpoint.every_steps = 7
    experiment.evaluation.rows = 3
    experiment.data.threads = 9
    experiment.stages[1].mesh.ring = 4
    experiment.stages[1].layout = "contiguous"
    experiment.stages[0].accumulation_steps = 8
    experiment.model.remat = "none"

  assert difference(change) is None


def test_what_may_not_change():
  def steps(experiment):
    experiment.stages[1].steps = 7

  def more_stages(experiment):
    experiment.stages.append(Stage(name="c"))

  def seed(experiment):
    experiment.seed = 1

  assert difference(steps) == "config.stages[1].steps=100, not 7"
  assert difference(more_stages) == "2 config.stages, not 3"
  assert difference(seed) == "config.seed=0, not 1"
