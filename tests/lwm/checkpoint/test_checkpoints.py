import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from lwm.checkpoint import digests
from lwm.checkpoint.checkpoints import Checkpoints
from lwm.checkpoint.identity import Identity, change_of_the_past
from lwm.checkpoint.position import Position
from lwm.config.experiment import DatasetConfig, Experiment, MixtureEntry, Stage
from lwm.errors import UserError
from lwm.parallel.sharding import MeshConfig
from lwm.program.stage import build_program

PROGRESS = Position(stage=0, step=5, total_steps=5)


@pytest.fixture
def identity(experiment):
  return Identity(experiment, {"tokenizer.model": b"pieces"}, {"text": "abc", "video": "def"})


def state_on(experiment, mesh, devices=None):
  """A program, and a state of random parameters and moments."""
  stage = experiment.stages[0]
  stage.mesh = mesh
  program = build_program(experiment, stage, devices)
  with jax.set_mesh(program.mesh):
    state = program.fresh_state(program.initial_params(3))
    moments = jax.tree.map(lambda leaf: leaf + 1, state.optimizer_state)
  return program, state._replace(optimizer_state=moments)


@pytest.fixture(scope="module")
def on_eight(make_experiment):
  """The program and the state on eight devices, which no test may donate."""
  return state_on(make_experiment(), MeshConfig())


def save(directory: pathlib.Path, identity, state, *steps, keep=2):
  checkpoints = Checkpoints(directory, keep)
  for step in steps:
    checkpoints.save(state, dataclasses.replace(PROGRESS, step=step, total_steps=step), identity)
  checkpoints.close()


def assert_same(left, right):
  for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_keeps_the_newest(on_eight, identity, tmp_path):
  _, state = on_eight
  save(tmp_path, identity, state, 1, 2, 3)
  assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["2", "3"]


def test_an_incomplete_checkpoint_is_ignored_and_removed(on_eight, identity, tmp_path):
  _, state = on_eight
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


def test_holds_config_and_tokenizer(experiment, on_eight, identity, tmp_path):
  _, state = on_eight
  save(tmp_path, identity, state, 5)
  assert (tmp_path / "5" / "tokenizer" / "tokenizer.model").read_bytes() == b"pieces"
  config = json.loads((tmp_path / "5" / "config" / "metadata").read_text())
  assert config == dataclasses.asdict(experiment)


def test_no_checkpoint_is_a_fresh_start(identity, tmp_path):
  checkpoints = Checkpoints(tmp_path, 2)
  assert checkpoints.latest(identity) == (None, [])
  checkpoints.close()


def test_another_run_is_refused_in_one_sentence(experiment, on_eight, identity, tmp_path):
  directory = tmp_path / "run" / "checkpoints"
  _, state = on_eight
  save(directory, identity, state, 5)
  checkpoints = Checkpoints(directory, 2)

  other = dataclasses.replace(
    experiment, optimizer=dataclasses.replace(experiment.optimizer, beta1=0.5)
  )
  with pytest.raises(UserError) as error:
    checkpoints.latest(dataclasses.replace(identity, experiment=other))
  assert str(error.value) == (
    f"{tmp_path}/run holds a run with config.optimizer.beta1=0.9, not 0.5: set it back, or start a "
    "new run with another --workdir."
  )
  with pytest.raises(UserError, match="another tokenizer than .*tokenizer.model: set it back"):
    checkpoints.latest(dataclasses.replace(identity, tokenizer_files={"t.model": b"other"}))
  with pytest.raises(UserError, match="dataset 'text' as it was before"):
    checkpoints.latest(dataclasses.replace(identity, manifests={"text": "new", "video": "def"}))
  # No stage has read it yet.
  checkpoints.latest(dataclasses.replace(identity, manifests={"text": "abc", "video": "new"}))
  checkpoints.close()


def flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def array_file(checkpoint: pathlib.Path) -> pathlib.Path:
  return max((checkpoint / "params").rglob("d/*"), key=lambda path: path.stat().st_size)


def test_a_flipped_byte_is_noticed_and_the_checkpoint_before_taken(on_eight, identity, tmp_path):
  """Without digests this byte is restored, and nothing says so."""
  program, state = on_eight
  save(tmp_path, identity, state, 4, 5)
  path = array_file(tmp_path / "5")
  content = path.read_bytes()
  flip(path)
  damaged = path.read_bytes()
  with Checkpoints(tmp_path, 2) as checkpoints:
    progress, notes = checkpoints.latest(identity)
    assert progress.total_steps == 4
    assert notes == [
      f"{tmp_path}/5 is damaged ({path.relative_to(tmp_path / '5')}) and was renamed to 5.damaged; "
      "resuming from the checkpoint after step 4"
    ]
    restored = checkpoints.restore(progress, program.state)
    assert_same(restored.params, state.params)
    # Set aside as it was, and out of the way of the one that is saved next.
    aside = tmp_path / "5.damaged" / path.relative_to(tmp_path / "5")
    assert aside.read_bytes() == damaged != content
    checkpoints.save(state, dataclasses.replace(PROGRESS), identity)
    assert checkpoints.latest(identity) == (PROGRESS, [])
    flip(array_file(tmp_path / "5"))
    assert "renamed to 5.damaged-2;" in checkpoints.latest(identity)[1][0]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5.damaged", "5.damaged-2"]


def test_any_file_that_is_lost_or_cut_short_is_noticed(on_eight, identity, tmp_path):
  _, state = on_eight
  save(tmp_path, identity, state, 4, 5)
  whole = tmp_path / "5"
  files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
  assert len(files) > 20
  for index, name in enumerate(files):
    path = whole / name
    content = path.read_bytes()
    path.unlink()
    if index % 2:
      path.write_bytes(content[: len(content) // 2])
    with Checkpoints(tmp_path, 2) as checkpoints:
      progress, notes = checkpoints.latest(identity)
    # Orbax's own notes are not needed.
    if path.name in ("commit_success.txt", "_CHECKPOINT_METADATA"):
      assert progress.total_steps == 5 and not notes, name
    else:
      assert progress.total_steps == 4 and f"({name}) and was renamed to 5.damaged" in notes[0]
      (tmp_path / "5.damaged").rename(whole)
    path.write_bytes(content)


def test_if_all_are_damaged_that_is_one_sentence_and_they_stay(on_eight, identity, tmp_path):
  _, state = on_eight
  save(tmp_path, identity, state, 4, 5)
  (tmp_path / "4" / "params" / "manifest.ocdbt").unlink()
  (tmp_path / "5" / "digests.json").unlink()
  for _ in range(2):
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(UserError) as error:
      checkpoints.latest(identity)
    assert str(error.value) == (
      f"All checkpoints are damaged: {tmp_path}/5 (digests.json), {tmp_path}/4 "
      "(params/manifest.ocdbt): restore one of them from a copy, or start a new run with "
      "another --workdir."
    )
  assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


def test_an_older_checkpoint_is_read(experiment, on_eight, identity, tmp_path):
  """Of before there were digests, batches passed over, and settings for faults."""
  _, state = on_eight
  save(tmp_path, identity, state, 5)
  checkpoint = tmp_path / "5"
  (checkpoint / "digests.json").unlink()
  (checkpoint / "progress" / "metadata").write_text('{"stage": 0, "step": 5, "total_steps": 5}')
  config = json.loads((checkpoint / "config" / "metadata").read_text())
  del config["faults"], config["loss"]["z_loss"], config["stages"][1]["layout"]
  (checkpoint / "config" / "metadata").write_text(json.dumps(config))
  with Checkpoints(tmp_path, 2) as checkpoints:
    progress, notes = checkpoints.latest(identity)
    assert progress == PROGRESS
    assert notes == [
      f"{checkpoint} was written by an older version, without digests.json, so it cannot be "
      "checked for damage"
    ]
    experiment.loss.z_loss = 1e-4
    with pytest.raises(UserError, match=r"config.loss.z_loss=0.0, not 0.0001: set it back"):
      checkpoints.latest(identity)


def test_a_newer_checkpoint_is_refused_in_one_sentence(on_eight, identity, tmp_path):
  _, state = on_eight
  save(tmp_path, identity, state, 5)
  path = tmp_path / "5" / "progress" / "metadata"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"epoch": 3}))
  (tmp_path / "5" / "digests.json").unlink()
  digests.write(tmp_path / "5")
  with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(UserError) as error:
    checkpoints.latest(identity)
  assert str(error.value) == (
    f"{tmp_path}/5 was written by a newer version of this program, which also stores epoch: resume "
    "it with that version."
  )


def test_progress_survives_as_it_is(on_eight, identity, tmp_path):
  _, state = on_eight
  progress = dataclasses.replace(
    PROGRESS, passed_over=((1, 3), (6, 7)), losses=((5, float(np.float32(0.1))), (8, 2.5))
  )
  with Checkpoints(tmp_path, 2) as checkpoints:
    checkpoints.save(state, progress, identity)
    assert checkpoints.latest(identity) == (progress, [])


def test_passing_over():
  progress = Position(stage=1, step=4, total_steps=10)
  assert progress.next_batch == 4 and progress.just_passed_over == 0
  progress = progress.passing_over(5).passing_over(7)
  assert progress.passed_over == ((4, 7),)
  assert progress.next_batch == 7 and progress.just_passed_over == 3
  progress = progress.after_step(()).passing_over(9)
  assert progress.passed_over == ((4, 7), (8, 9))
  assert progress.step == 5 and progress.next_batch == 9 and progress.just_passed_over == 1
  assert progress.at_stage(2) == Position(stage=2, step=0, total_steps=11)


def difference(change, position: Position) -> str | None:
  def make():
    mixtures = [[MixtureEntry("text")], [MixtureEntry("text"), MixtureEntry("video")]]
    return Experiment(
      datasets=[DatasetConfig("text", "a/text"), DatasetConfig("video", "a/video")],
      stages=[Stage(name=name, mixture=mixture) for name, mixture in zip("ab", mixtures)],
    )

  stored, current = make(), make()
  change(current)
  stored = json.loads(json.dumps(dataclasses.asdict(stored)))
  return change_of_the_past(stored, dataclasses.asdict(current), position)


# In the second of two stages, and in the first.
LATE, EARLY = Position(1, 10, 110), Position(0, 10, 10)


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
    experiment.datasets[1].path = "moved/video"
    experiment.init_from = "runs/other"

  assert difference(change, LATE) is None


def test_what_may_not_change():
  def seed(experiment):
    experiment.seed = 1

  def steps_of_a_stage_that_is_done(experiment):
    experiment.stages[0].steps = 101

  def fewer_steps_than_are_done(experiment):
    experiment.stages[1].steps = experiment.stages[1].warmup_steps = 7

  def fewer_stages(experiment):
    del experiment.stages[1]

  def weighting(experiment):
    experiment.datasets[1].weighting = "example"

  assert difference(seed, LATE) == "config.seed=0, not 1"
  found = difference(steps_of_a_stage_that_is_done, LATE)
  assert found == "config.stages[0].steps=100, not 101"
  found = difference(fewer_steps_than_are_done, LATE)
  assert found == "config.stages[1].steps=100, of which 10 are done, not 7"
  assert difference(fewer_stages, LATE) == "2 config.stages, not 1"
  assert difference(weighting, LATE) == "config.datasets.video.weighting='token', not 'example'"


def test_what_is_still_to_come_may_change():
  def change(experiment):
    experiment.stages[0].steps = 50
    experiment.stages[1].peak_learning_rate = 1e-3
    experiment.stages[1].mixture = [MixtureEntry("books")]
    experiment.stages.append(Stage(name="c", mixture=[MixtureEntry("text")]))
    experiment.datasets[1:] = [DatasetConfig("books", "a/books", "example")]

  assert difference(change, EARLY) is None

  def longer(experiment):
    experiment.stages[1].steps = 200
    experiment.stages.append(Stage(name="c", mixture=[MixtureEntry("text")]))

  assert difference(longer, LATE) is None
