"""What a run reports: lines for people, records and events for tools, and curves for both."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from lwm.checkpoint.position import Position
from lwm.config import experiment as experiment_lib
from lwm.config.experiment import AnyStage
from lwm.cost.peak import peak_flops
from lwm.report import goodput
from lwm.report.expert_plots import plot_loads
from lwm.report.goodput import Account
from lwm.report.input_wait import InputWait, InputWatch
from lwm.report.metrics import FILE_NAME, MetricsLog, read_metrics
from lwm.report.plots import plot_stage
from lwm.report.presentation import Presentation
from lwm.report.profiling import Profiler
from lwm.report.terminal import ProgressLine


class Reporter:
  """Turns a step's metrics into a line, a record, events and curves. Only process 0 reports."""

  def __init__(
    self,
    presentation: Presentation,
    workdir: pathlib.Path,
    position: Position,
    profile_steps: range = range(0),
  ):
    """Continues the files of `workdir`.

    Args:
      presentation: of the run's experiment.
      workdir: of the run.
      position: where the run starts or resumes; records of later steps are dropped.
      profile_steps: steps to trace, counted over all stages from 1.
    """
    self._presentation = presentation
    stages: Sequence[AnyStage] = presentation.experiment.stages
    self.total_steps = sum(stage.steps for stage in stages)
    self._workdir = workdir
    self._first_step = {
      stage.name: sum(before.steps for before in stages[:index])
      for index, stage in enumerate(stages)
    }
    self._speaks = jax.process_index() == 0
    records = read_metrics(workdir / FILE_NAME) if self._speaks else []
    # Where the run's time goes. The training loop charges it too.
    self.account = Account.resumed(records, position.total_steps)
    self._steps_done = position.total_steps
    self._has_begun = False
    self._last_wait: InputWait | None = None
    self._input_watch = InputWatch(self.say)
    self._profiler = Profiler(workdir, profile_steps, self.account, self.say)
    if not self._speaks:
      return
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.txt").write_text(experiment_lib.dump(presentation.experiment))
    peaks = [peak_flops(device, presentation.compute_dtype) for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    # All processes have the same devices.
    self._peak = sum(known) * jax.process_count() if len(known) == len(peaks) else None
    # On record at once: an attempt that is killed before its first step took time too.
    unfinished = position.total_steps < self.total_steps
    self._open(position, [self.account.record(position.total_steps)] if unfinished else [])

  def _open(self, position: Position, carried: list[dict[str, Any]]) -> None:
    self._log = MetricsLog(self._workdir, position.total_steps, carried)
    stages: Sequence[AnyStage] = self._presentation.experiment.stages[position.stage :]
    units = [self._presentation.units_per_batch(stage) for stage in stages]
    ahead = sum(stage.steps * size for stage, size in zip(stages, units))
    self._line = ProgressLine(
      self._presentation,
      steps_done=position.total_steps,
      steps=self.total_steps,
      units_ahead=ahead - position.step * units[0],
    )

  def say(self, text: str) -> None:
    """Prints a line."""
    if self._speaks:
      self._line.say(text)

  def start_clock(self) -> None:
    """Steps begin: time spent before does not count as the next step's."""
    self.account.steps_begin()
    self._last_wait = None
    self._has_begun = True
    self._write_goodput()

  def dispatch(self, total_steps: int) -> contextlib.AbstractContextManager:
    """Goes around the dispatch of step `total_steps`, and names the step in profiles."""
    return self._profiler.step(total_steps)

  def step(self, stage: AnyStage, step: int, metrics: dict[str, Any], wait: InputWait) -> None:
    """Reports step `step` (counted from 1) of `stage`, whose metrics are NumPy arrays."""
    metrics = {name: value.tolist() for name, value in metrics.items()}
    seconds, starved = self.account.lap("step"), wait.starved(self._last_wait)
    self.account.move("step", "input", starved)
    if self._last_wait:
      # The first batch takes time on every host.
      self._input_watch.step(seconds, starved)
    self._last_wait = wait
    self._steps_done = self._first_step[stage.name] + step
    self._profiler.finished(self._steps_done)
    if not self._speaks:
      return
    presentation, unit = self._presentation, self._presentation.unit.name
    record = self._record("train", stage, step) | presentation.recorded(metrics)
    record |= {
      "seconds": seconds,
      "data_seconds": wait.seconds,
      "starved_seconds": starved,
      f"{unit}_per_second": metrics[unit] / seconds,
    }
    if self._peak:
      record["mfu"] = presentation.flops(stage, metrics) / seconds / self._peak
    self._log.write(record)
    batch_units = presentation.units_per_batch(stage)
    self._line.step(record, stage_steps=stage.steps, batch_units=batch_units)

  def evaluation(self, stage: AnyStage, step: int, held_out: list[dict[str, Any]]) -> None:
    """Reports results on held-out rows, one entry per dataset or per dataset and modality."""
    if not self._speaks:
      return
    self._log.write(self._record("evaluation", stage, step) | {"held_out": held_out})
    if held_out:
      summary = self._presentation.summary(held_out)
      self.say(f"{stage.name} {step}/{stage.steps} | held out | {summary}")

  def fault(self, stage: AnyStage, position: Position, event: str, text: str) -> None:
    """Reports what went wrong and what was done about it, as a line and a record."""
    self.account.lap("restart")
    if not self._speaks:
      return
    self._log.write(self._record("fault", stage, position.step) | {"event": event, "text": text})
    self.say(f"{stage.name} {position.step}/{stage.steps} | {text}")

  def rewind(self, position: Position) -> None:
    """Drops the records of steps after `position`: those steps will run again."""
    self.account.lap("restart")
    self._steps_done = position.total_steps
    if self._speaks:
      self.account.forget_steps(read_metrics(self._workdir / FILE_NAME), position.total_steps)
      self._line.close()
      self._log.close()
      self._open(position, [self.account.record(position.total_steps)])

  def sync(self) -> None:
    """Returns once everything reported so far is on disk."""
    if self._speaks:
      self._log.sync()

  def plot(self, stage: AnyStage) -> None:
    """Draws the curves of a finished stage."""
    if not self._speaks:
      return
    path = self._workdir / "curves" / f"{stage.name}.png"
    records = read_metrics(self._workdir / FILE_NAME)
    plot_stage(self._presentation, records, stage.name, path)
    self.say(f"curves of {stage.name}: {path}")
    loads = path.with_name(f"{stage.name}_experts.png")
    if plot_loads(records, stage.name, loads):
      self.say(f"loads of experts in {stage.name}: {loads}")

  def close(self) -> None:
    """Writes and closes the files."""
    self._profiler.close()
    self.account.lap("other")
    if self._has_begun:
      self._write_goodput()
    if self._speaks:
      self._log.close()
      self._line.close()

  def finish(self, checkpoint: pathlib.Path) -> None:
    """Prints the held-out results, where the time went, and where the files are."""
    self.close()
    if not self._speaks:
      return
    records = read_metrics(self._workdir / FILE_NAME)
    evaluations = [
      record for record in records if record["kind"] == "evaluation" and record["held_out"]
    ]
    if evaluations:
      title = self._presentation.held_out_title
      print(f"\nAfter step {evaluations[-1]['total_steps']}, {title}:")
      print(self._presentation.table(evaluations[-1]["held_out"]))
    account = [record for record in records if record["kind"] == "goodput"]
    if account:
      print(f"\n{goodput.table(account[-1])}")
    print(f"\ncheckpoint  {checkpoint}")
    print(f"curves      {self._workdir / 'curves'}")
    print(f"metrics     {self._workdir / FILE_NAME}, {self._workdir / 'tensorboard'}")

  def _write_goodput(self) -> None:
    if self._speaks:
      self._log.write(self.account.record(self._steps_done))

  def _record(self, kind: str, stage: AnyStage, step: int) -> dict[str, Any]:
    return {
      "kind": kind,
      "stage": stage.name,
      "step": step,
      "total_steps": self._first_step[stage.name] + step,
    }
