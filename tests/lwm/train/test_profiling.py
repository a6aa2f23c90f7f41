"""Traces of chosen steps: real files, also after a resume, and steps in flight undisturbed."""

import time
import types

import jax
import numpy as np
import pytest

from lwm.checkpoint.position import START
from lwm.config.experiment import FaultConfig, Stage
from lwm.errors import UserError
from lwm.report.goodput import Account
from lwm.report.profiling import Profiler, parse_steps
from lwm.report.reporter import Reporter
from lwm.train import loop


def steps_in(folder) -> list[int]:
  """Steps that the only trace under `folder` is annotated with."""
  (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(path)).planes
  return [
    dict(event.stats)["step_num"]
    for plane in planes
    for line in plane.lines
    for event in line.events
    if event.name == "train"
  ]


class Killed(BaseException):
  pass


@pytest.mark.slow
def test_a_trace_holds_the_steps_asked_for(experiment, tmp_path, capsys, monkeypatch):
  del experiment.stages[1:]
  experiment.stages[0].steps = 9
  workdir = tmp_path / "run"
  plain_step = Reporter.step

  def step_or_die(self, stage, step, *arguments):
    if step == 6:
      while not (workdir / "checkpoints" / "4").exists():
        time.sleep(0.01)
      raise Killed
    plain_step(self, stage, step, *arguments)

  monkeypatch.setattr(Reporter, "step", step_or_die)
  devices = jax.devices()[:1]
  with pytest.raises(Killed):
    loop.train(experiment, workdir, devices, profile_steps=range(2, 4))
  # Step 4 was dispatched while 3 ran.
  assert steps_in(workdir / "profile") == [2, 3, 4]
  assert f"xprof --logdir={workdir / 'profile'}" in capsys.readouterr().out
  monkeypatch.setattr(Reporter, "step", plain_step)
  (workdir / "profile").rename(workdir / "first")

  # Goes on after step 4; the checkpoint of step 8 leaves none in flight.
  loop.train(experiment, workdir, devices, profile_steps=range(3, 9))
  assert steps_in(workdir / "profile") == [5, 6, 7, 8]


@pytest.mark.slow
def test_the_flag(undisturbed):
  assert steps_in(undisturbed / "profile") == [3, 4]
  assert f"xprof --logdir={undisturbed / 'profile'}" in (undisturbed / "output.txt").read_text()


def test_steps_are_traced_without_waiting_for_steps(tmp_path, monkeypatch):
  events = []
  monkeypatch.setattr(
    jax.profiler, "start_trace", lambda folder, profiler_options: events.append("start")
  )
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
  profiler = Profiler(tmp_path, range(2, 4), Account(), events.append)

  class Parts:
    """What run_steps needs of a Reporter, Checkpoints, a StopNotice and a Loader."""

    def iterate(self, start, stop):
      return iter(range(start, stop))

    def start_clock(self):
      pass

    def check(self):
      pass

    def reached(self):
      return False

    def dispatch(self, total_steps):
      return profiler.step(total_steps)

    def step(self, stage, step, metrics, wait):
      events.append(f"report {step}")
      profiler.finished(step)

  def train_step(state, batch, limit):
    events.append(f"dispatch {state + 1}")
    return state + 1, {"applied": True, "loss": np.float32(1)}

  class FiveSteps(loop.StageLoop):
    def __init__(self):
      parts = Parts()
      self.run = types.SimpleNamespace(reporter=parts, checkpoints=parts, notice=parts)
      self.loader, self.stage, self.train_step = parts, Stage(steps=9), train_step
      self._faults, self._batches = FaultConfig(), None

  FiveSteps().run_steps(0, START, 5)
  assert events[:-2] == [
    "dispatch 1",
    "start",
    "dispatch 2",
    "report 1",
    "dispatch 3",
    "report 2",
    "dispatch 4",
    "report 3",
    "stop",
    f"profile: xprof --logdir={tmp_path / 'profile'} (pip install xprof)",
    "dispatch 5",
  ]


def test_a_run_that_is_past_the_steps_says_so_once(tmp_path):
  said = []
  profiler = Profiler(tmp_path, range(2, 4), Account(), said.append)
  for step in (9, 10):
    profiler.step(step)
  profiler.close()
  assert said == ["--profile_steps: nothing to trace, because the run is at step 9 already"]


def test_steps():
  assert parse_steps("10:13") == range(10, 13)
  for text in ("10", "13:10", "0:4", "a:b", "5:5", "-1:4"):
    with pytest.raises(UserError, match=f"--profile_steps={text}: give a range"):
      parse_steps(text)
