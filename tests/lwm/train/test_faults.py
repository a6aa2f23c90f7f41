"""Bad steps, stops and other meshes on the way, in runs of a few steps on one device."""

import contextlib
import errno
import os
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.config.experiment import FaultConfig
from lwm.data import Loader
from lwm.errors import ResumeError, UserError
from lwm.parallel.sharding import MeshConfig
from lwm.program.stage import build_program
from lwm.report.metrics import MetricsLog, read_metrics
from lwm.train import language, loop
from lwm.train.faults import loss_limit, with_loss
from tests.lwm.train.test_resume import accounts, final_state, steps_done


@pytest.fixture
def experiment(make_experiment):
  """Nine steps of one stage, a checkpoint after every third."""
  experiment = make_experiment()
  del experiment.stages[1:]
  experiment.stages[0].steps = 9
  experiment.checkpoint.every_steps = 3
  experiment.evaluation.every_steps = 100
  return experiment


def run(
  experiment,
  workdir: pathlib.Path,
  monkeypatch,
  stage=0,
  nan=(),
  spikes=(),
  left_out=(),
  stop_at=None,
  devices=1,
) -> None:
  """Trains on so many devices.

  Of the batches of `stage`, those in `nan` make its loss NaN, those in `spikes` have targets that
  occur nowhere else, and those in `left_out` do not exist; when batch `stop_at` is read the process
  gets a SIGTERM.
  """

  class Altered(Loader):
    def __init__(self, experiment, index, mesh):
      super().__init__(experiment, index, mesh)
      self.altered = index == stage

    def iterate(self, start=0, stop=None):
      if not self.altered:
        yield from super().iterate(start, stop)
        return
      indices = [index for index in range(stop + len(left_out)) if index not in left_out]
      for index in indices[start:stop]:
        batch = self.batch(index)
        if index in nan:
          batch["loss_weights"] *= jnp.nan
        if index in spikes:
          batch["targets"] *= 0
        if index == stop_at:
          os.kill(os.getpid(), signal.SIGTERM)
        yield batch

  monkeypatch.setattr(language, "Loader", Altered)
  loop.train(experiment, workdir, jax.devices()[:devices])


def assert_equal(one: pathlib.Path, other: pathlib.Path, total_steps: int = 9) -> None:
  """The last checkpoints hold the same parameters and moments, bit for bit."""
  states = [final_state(workdir, total_steps) for workdir in (one, other)]
  for left, right in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_array_equal(left, right)


def events(workdir: pathlib.Path) -> list[dict]:
  records = read_metrics(workdir / "metrics.jsonl")
  return [record for record in records if record["kind"] == "fault"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "policy, bad, passed_over, steps",
  [
    ("skip", (0, 4, 5), (0, 4, 5), (0, 3, 3)),
    # Back to the checkpoint after three, twice.
    ("rollback", (4, 7), (3, 4, 5, 6, 7), (3, 3)),
    # Back to the start.
    ("rollback", (1,), (0, 1), (0,)),
  ],
)
def test_a_run_past_bad_batches_is_one_that_never_saw_them(
  experiment, tmp_path, monkeypatch, capsys, policy, bad, passed_over, steps
):
  experiment.faults.bad_step = policy
  run(experiment, tmp_path / "bad", monkeypatch, nan=bad)
  lines = capsys.readouterr().out.splitlines()
  run(experiment, tmp_path / "clean", monkeypatch, left_out=passed_over)
  assert_equal(tmp_path / "bad", tmp_path / "clean")
  # Every step is on record once, and every event is a line and a record.
  assert steps_done(tmp_path / "bad") == list(range(1, 10))
  found = events(tmp_path / "bad")
  assert [(event["event"], event["step"]) for event in found] == [(policy, step) for step in steps]
  for event, batch in zip(found, bad):
    assert f", of batch {batch}: its loss is nan" in event["text"]
    assert sum(line.endswith(event["text"]) for line in lines) == 1


@pytest.mark.slow
def test_rolls_back_to_the_end_of_the_stage_before(make_experiment, tmp_path, monkeypatch):
  experiment = make_experiment()
  for stage, steps in zip(experiment.stages, (2, 2)):
    stage.steps, stage.warmup_steps = steps, 0
  experiment.faults.bad_step = "rollback"
  run(experiment, tmp_path / "bad", monkeypatch, stage=1, nan=(1,))
  run(experiment, tmp_path / "clean", monkeypatch, stage=1, left_out=(0, 1))
  assert_equal(tmp_path / "bad", tmp_path / "clean", 4)


@pytest.mark.slow
def test_a_stopped_run_passes_over_the_same_batches(experiment, tmp_path, monkeypatch):
  """Stopped after one rollback, and after another."""
  experiment.faults.bad_step = "rollback"
  bad = (1, 7)
  run(experiment, tmp_path / "straight", monkeypatch, nan=bad)
  for stop_at, after in ((3, 2), (9, 5)):
    with pytest.raises(ResumeError) as error:
      run(experiment, tmp_path / "stopped", monkeypatch, nan=bad, stop_at=stop_at)
    checkpoint = tmp_path / "stopped" / "checkpoints" / str(after)
    assert str(error.value) == (
      f"SIGTERM: stopped after step {after} of 9; run the same command "
      f"again to resume from {checkpoint}."
    )
    assert checkpoint.is_dir()
  run(experiment, tmp_path / "stopped", monkeypatch, nan=bad)
  assert_equal(tmp_path / "stopped", tmp_path / "straight")
  assert steps_done(tmp_path / "stopped") == list(range(1, 10))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ("skip", "rollback"))
def test_a_spike_is_bad_too(experiment, tmp_path, monkeypatch, policy):
  experiment.faults = FaultConfig(bad_step=policy, spike_factor=1.2, spike_window=3)
  run(experiment, tmp_path / "run", monkeypatch, spikes=(6,))
  (event,) = events(tmp_path / "run")
  assert "of batch 6: its loss of" in event["text"]
  assert "1.2 times the median of the last 3" in event["text"]


@pytest.mark.slow
def test_raises_by_default_and_goes_on_with_another_policy(experiment, tmp_path, monkeypatch):
  with pytest.raises(UserError) as error:
    run(experiment, tmp_path / "run", monkeypatch, nan=(4,))
  assert str(error.value) == (
    f"text_64, step 5, of batch 4: its loss is nan; run the same command with "
    f"--config.faults.bad_step=skip or rollback to resume from {tmp_path}/run/checkpoints/3 and "
    "skip this batch."
  )
  experiment.faults.bad_step = "skip"
  run(experiment, tmp_path / "run", monkeypatch, nan=(4,))
  run(experiment, tmp_path / "clean", monkeypatch, left_out=(4,))
  assert_equal(tmp_path / "run", tmp_path / "clean")


@pytest.mark.parametrize("policy", ("skip", "rollback"))
def test_too_many_in_a_row_end_the_run(experiment, tmp_path, monkeypatch, policy):
  experiment.faults = FaultConfig(bad_step=policy, max_in_a_row=2)
  bad = tuple(range(4, 20))
  message = "^text_64, step .*, after 2 others in a row .* the last checkpoint is .*/3"
  with pytest.raises(UserError, match=message):
    run(experiment, tmp_path / "run", monkeypatch, nan=bad)
  assert len(events(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_disk_that_fails_under_the_metrics_ends_in_a_sentence(experiment, tmp_path, monkeypatch):
  def fail(self):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  with monkeypatch.context() as patch, pytest.raises(ResumeError) as error:
    patch.setattr(MetricsLog, "sync", fail)
    run(experiment, tmp_path, monkeypatch)
  assert str(error.value) == (
    f"Writing to {tmp_path} failed (Input/output error): fix the disk and run the same "
    "command again to resume from the last checkpoint."
  )


@pytest.mark.slow
def test_an_attempt_killed_before_its_first_step_took_time_too(experiment, tmp_path, monkeypatch):
  def killed(*arguments):
    time.sleep(0.1)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop.StageLoop, "_compile", killed)
    run(experiment, tmp_path, monkeypatch)
  run(experiment, tmp_path, monkeypatch)
  account = accounts(tmp_path)[-1]
  assert account["attempts"] == 2 and account["restart_seconds"] > 0.1


@pytest.mark.slow
def test_goes_on_over_another_mesh(experiment, tmp_path, monkeypatch):
  """Stopped on one device, ended on eight: the losses are those of one device."""
  meshes = {1: MeshConfig(fsdp=1), 8: MeshConfig(data=2, fsdp=2, ring=2)}
  run(experiment, tmp_path / "one", monkeypatch)
  for (devices, mesh), stop_at in zip(meshes.items(), (4, None)):
    experiment.stages[0].mesh = mesh
    stops = pytest.raises(ResumeError) if stop_at else contextlib.nullcontext()
    with stops:
      run(experiment, tmp_path / "many", monkeypatch, stop_at=stop_at, devices=devices)
  losses = [
    [
      record["loss"]
      for record in read_metrics(tmp_path / name / "metrics.jsonl")
      if record["kind"] == "train"
    ]
    for name in ("one", "many")
  ]
  assert len(losses[0]) == 9
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def losses_of(*values: float) -> tuple[tuple[int, float], ...]:
  return tuple(enumerate(values))


def test_limit_is_of_a_whole_window_without_the_batch_just_before():
  faults = FaultConfig(spike_factor=2.0, spike_window=3)
  assert loss_limit(faults, losses_of(1.0, 5.0), 3) == np.inf
  # Of batches 0, 1 and 2; that of 3 may not be known yet.
  assert loss_limit(faults, losses_of(1.0, 5.0, 2.0), 4) == 4
  assert loss_limit(faults, losses_of(1.0, 5.0, 2.0, 100.0), 4) == 4
  assert loss_limit(faults, losses_of(1.0, 5.0, 2.0, 100.0), 5) == 10
  assert loss_limit(FaultConfig(spike_window=1), losses_of(1.0, 1.0), 5) == np.inf


def test_no_more_losses_are_kept_than_are_asked_for():
  faults = FaultConfig(spike_factor=2.0, spike_window=3)
  losses = ()
  for batch in range(9):
    before = losses
    losses = with_loss(faults, losses, batch, float(batch))
  assert len(losses) == 4
  assert loss_limit(faults, losses, 9) == loss_limit(faults, before, 9) == 2 * 6
  assert with_loss(FaultConfig(), (), 0, 1.0) == ()


@pytest.mark.slow
@pytest.mark.parametrize("moments", ({}, {"moment_dtype": "int8"}, {"offload": True}))
def test_a_bad_step_leaves_the_state_as_it_was(experiment, moments):
  for name, value in moments.items():
    setattr(experiment.optimizer, name, value)
  stage = experiment.stages[0]
  program = build_program(experiment, stage, jax.devices()[:1])
  with jax.set_mesh(program.mesh):
    state = program.fresh_state(program.initial_params(0))
    batch = Loader(experiment, 0, program.mesh).batch(0)
    # All limits have one dtype, so that the step is compiled once.
    state, metrics = program.train_step(state, batch, jnp.float32(np.inf))
    assert metrics["applied"] == 1 and state.step == 1
    before = jax.tree.map(np.array, jax.device_get(state))
    bad = batch | {"loss_weights": batch["loss_weights"] * jnp.nan}
    for refused, limit in ((bad, jnp.float32(np.inf)), (batch, metrics["loss"] - 1)):
      state, metrics = program.train_step(state, refused, limit)
      assert metrics["applied"] == 0
      jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
