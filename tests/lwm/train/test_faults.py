"""Bad steps, stops and other meshes on the way, in runs of a few steps on one device."""

import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lwm.data import Loader
from lwm.errors import ResumeError
from lwm.errors import UserError
from lwm.experiment import FaultConfig
from lwm.experiment import LossConfig
from lwm.experiment import MeshConfig
from lwm.model import LossSums
from lwm.train import loop
from lwm.train.faults import loss_limit
from lwm.train.faults import with_loss
from lwm.train.metrics import read_metrics
from lwm.train.state import TrainState
from lwm.train.step import train_step
from tests.lwm.train.test_resume import final_state
from tests.lwm.train.test_resume import steps_done


@pytest.fixture
def experiment(make_experiment):
  """Eight steps and two, a checkpoint after every third."""
  experiment = make_experiment()
  for stage, steps in zip(experiment.stages, (8, 2)):
    stage.steps = steps
    stage.warmup_steps = 1
  experiment.checkpoint.every_steps = 3
  experiment.evaluation.every_steps = 100
  return experiment


def run(experiment, workdir: pathlib.Path, monkeypatch, bad=(), left_out=(), stop_at=None):
  """Trains on one device. Of the first stage's batches, those in `bad` make the loss NaN, and those
  in `left_out` do not exist; at batch `stop_at` the process is sent SIGTERM.
  """
  class Altered(Loader):

    def __init__(self, experiment, stage, mesh):
      super().__init__(experiment, stage, mesh)
      self.first = stage == 0

    def iterate(self, start=0, stop=None):
      if not self.first:
        yield from super().iterate(start, stop)
        return
      # As far as there can be any need, for those left out.
      indices = [index for index in range(stop + len(left_out)) if index not in left_out]
      for index in indices[start:stop]:
        batch = self.batch(index)
        if index in bad:
          batch["loss_weights"] *= jnp.nan
        if index == stop_at:
          os.kill(os.getpid(), signal.SIGTERM)
        yield batch

  monkeypatch.setattr(loop, "Loader", Altered)
  loop.train(experiment, workdir, jax.devices()[:1])


def final(workdir: pathlib.Path) -> list[np.ndarray]:
  return jax.tree.leaves(final_state(workdir, 10))


def assert_equal(one: pathlib.Path, other: pathlib.Path) -> None:
  for left, right in zip(final(one), final(other), strict=True):
    np.testing.assert_array_equal(left, right)


def faults(workdir: pathlib.Path) -> list[dict]:
  records = read_metrics(workdir / "metrics.jsonl")
  return [record for record in records if record["kind"] == "fault"]


@pytest.mark.parametrize(
    "policy, bad, passed_over",
    [
        ("skip", (4, 7), (4, 7)),
        ("skip", (0, 1), (0, 1)),
        # After the checkpoint at 3; and again before the next one.
        ("rollback", (4, 7), (3, 4, 5, 6, 7)),
        # Before the first checkpoint.
        ("rollback", (1,), (0, 1)),
    ],
)
def test_a_run_past_bad_batches_is_one_that_never_saw_them(
    experiment, tmp_path, monkeypatch, capsys, policy, bad, passed_over
):
  experiment.faults.bad_step = policy
  run(experiment, tmp_path / "bad", monkeypatch, bad=bad)
  lines = capsys.readouterr().out.splitlines()
  run(experiment, tmp_path / "clean", monkeypatch, left_out=passed_over)
  assert_equal(tmp_path / "bad", tmp_path / "clean")
  # Every step is on record once, and every event in a line and a record.
  assert steps_done(tmp_path / "bad") == list(range(1, 11))
  events = faults(tmp_path / "bad")
  assert [event["event"] for event in events] == [policy] * len(events)
  assert len(events) == (len(bad) if policy == "skip" else len(bad))
  for event in events:
    assert "its loss is nan" in event["text"]
    assert sum(line.endswith(event["text"]) for line in lines) == 1
