"""What a run says: lines for a person, records and events for tools, curves for both."""

import contextlib
import pathlib
from typing import Any

import jax

from lwm.checkpoint.position import Position
from lwm.config import experiment as experiment_lib
from lwm.config.experiment import Experiment, Stage
from lwm.cost.peak import peak_flops
from lwm.model.flops import train_flops
from lwm.report import goodput, held_out as held_out_lib
from lwm.report.goodput import Account
from lwm.report.input_wait import InputWait, InputWatch
from lwm.report.metrics import FILE_NAME, MetricsLog, read_metrics
from lwm.report.plots import plot_stage
from lwm.report.profiling import Profiler
from lwm.report.terminal import ProgressLine


class Reporter:
  """Turns a step's scalars into a line, a record, events and curves; only process 0 speaks."""

  def __init__(
    self,
    experiment: Experiment,
    workdir: pathlib.Path,
    done: Position,
    profile_steps: range = range(0),
  ):
    """Takes up the files of `workdir` after the steps that are `done`; profiles those given."""
    stages = experiment.stages
    self.total_steps = sum(stage.steps for stage in stages)
    self._experiment = experiment
    self._workdir = workdir
    self._first_step = {
      stage.name: sum(before.steps for before in stages[:index])
      for index, stage in enumerate(stages)
    }
    self._speaks = jax.process_index() == 0
    records = read_metrics(workdir / FILE_NAME) if self._speaks else []
    # Where the run's time goes; the loop books what it alone knows of.
    self.account = Account.resumed(records, done.total_steps)
    self._steps_done = done.total_steps
    self._has_begun = False
    self._last_wait = None
    self._input_watch = InputWatch(self.say)
    self._profiler = Profiler(workdir, profile_steps, self.account, self.say)
    if not self._speaks:
      return
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.txt").write_text(experiment_lib.dump(experiment))
    peaks = [peak_flops(device, experiment.model.compute_dtype) for device in jax.local_devices()]
    # All processes have the same devices.
    self._peak = None if None in peaks else sum(peaks) * jax.process_count()
    # On record at once: an attempt that is killed before its first step took time too.
    unfinished = done.total_steps < self.total_steps
    self._open(done, [self.account.record(done.total_steps)] if unfinished else [])

  def _open(self, done: Position, carried: list[dict[str, Any]]) -> None:
    self._log = MetricsLog(self._workdir, done.total_steps, carried)
    stages = self._experiment.stages
    tokens = sum(stage.steps * stage.tokens_per_batch for stage in stages[done.stage :])
    self._line = ProgressLine(
      steps_done=done.total_steps,
      steps=self.total_steps,
      tokens_ahead=tokens - done.step * stages[done.stage].tokens_per_batch,
    )

  def say(self, text: str) -> None:
    if self._speaks:
      self._line.say(text)

  def start_clock(self) -> None:
    """Whatever came before is not part of the next step's time."""
    self.account.steps_begin()
    self._last_wait = None
    self._has_begun = True
    self._write_goodput()

  def dispatch(self, total_steps: int) -> contextlib.AbstractContextManager:
    """Around the dispatch of the step that is to be number `total_steps`: names it in profiles."""
    return self._profiler.step(total_steps)

  def step(self, stage: Stage, step: int, metrics: dict[str, jax.Array], wait: InputWait) -> None:
    """Waits for the scalars of step `step` (from 1) of `stage`, and reports them."""
    metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
    seconds, starved = self.account.lap("step"), wait.starved(self._last_wait)
    self.account.move("step", "input", starved)
    if self._last_wait:
      # The first batch of all takes its time on any host.
      self._input_watch.step(seconds, starved)
    self._last_wait = wait
    self._steps_done = self._first_step[stage.name] + step
    self._profiler.finished(self._steps_done)
    if not self._speaks:
      return
    flops = train_flops(
      self._experiment.model,
      **{
        name: metrics[name]
        for name in ("tokens", "attended_pairs", "text_targets", "vision_targets")
      },
      softmax_range=self._experiment.loss.softmax_range,
    )
    record = self._record("train", stage, step)
    record |= {
      name: value
      for name, value in metrics.items()
      if not (name.endswith("_loss") and metrics[name.replace("_loss", "_targets")] == 0)
    }
    record |= {
      "seconds": seconds,
      "data_seconds": wait.seconds,
      "starved_seconds": starved,
      "tokens_per_second": metrics["tokens"] / seconds,
    }
    if self._peak:
      record["mfu"] = flops / seconds / self._peak
    self._log.write(record)
    self._line.step(record, stage_steps=stage.steps, batch_tokens=stage.tokens_per_batch)

  def evaluation(self, stage: Stage, step: int, held_out: list[dict[str, Any]]) -> None:
    """Reports the rows of `held_out_lib.held_out_losses`."""
    if not self._speaks:
      return
    self._log.write(self._record("evaluation", stage, step) | {"held_out": held_out})
    if held_out:
      self.say(f"{stage.name} {step}/{stage.steps} | held out | {held_out_lib.summary(held_out)}")

  def fault(self, stage: Stage, done: Position, event: str, text: str) -> None:
    """Reports what went wrong, in a line and a record, and what was done about it."""
    self.account.lap("restart")
    if not self._speaks:
      return
    self._log.write(self._record("fault", stage, done.step) | {"event": event, "text": text})
    self.say(f"{stage.name} {done.step}/{stage.steps} | {text}")

  def rewind(self, done: Position) -> None:
    """Forgets the steps beyond those `done`: they will be made again."""
    self.account.lap("restart")
    self._steps_done = done.total_steps
    if self._speaks:
      self.account.forget_steps(read_metrics(self._workdir / FILE_NAME), done.total_steps)
      self._line.close()
      self._log.close()
      self._open(done, [self.account.record(done.total_steps)])

  def sync(self) -> None:
    """Returns when all that was reported is on disk."""
    if self._speaks:
      self._log.sync()

  def plot(self, stage: Stage) -> None:
    """Draws the curves of a finished stage."""
    if not self._speaks:
      return
    path = self._workdir / "curves" / f"{stage.name}.png"
    path.parent.mkdir(exist_ok=True)
    plot_stage(read_metrics(self._workdir / FILE_NAME), stage.name, path)
    self.say(f"curves of {stage.name}: {path}")

  def close(self) -> None:
    """Writes out and gives up the files."""
    self._profiler.close()
    self.account.lap("other")
    if self._has_begun:
      self._write_goodput()
    if self._speaks:
      self._log.close()
      self._line.close()

  def finish(self, checkpoint: pathlib.Path) -> None:
    """Says where everything is, and how well the model does."""
    self.close()
    if not self._speaks:
      return
    records = read_metrics(self._workdir / FILE_NAME)
    evaluations = [
      record for record in records if record["kind"] == "evaluation" and record["held_out"]
    ]
    if evaluations:
      print(f"\nAfter step {evaluations[-1]['total_steps']}, in nats a target:")
      print(held_out_lib.table(evaluations[-1]["held_out"]))
    account = [record for record in records if record["kind"] == "goodput"]
    if account:
      print(f"\n{goodput.table(account[-1])}")
    print(f"\ncheckpoint  {checkpoint}")
    print(f"curves      {self._workdir / 'curves'}")
    print(f"metrics     {self._workdir / FILE_NAME}, {self._workdir / 'tensorboard'}")

  def _write_goodput(self) -> None:
    if self._speaks:
      self._log.write(self.account.record(self._steps_done))

  def _record(self, kind: str, stage: Stage, step: int) -> dict[str, Any]:
    return {
      "kind": kind,
      "stage": stage.name,
      "step": step,
      "total_steps": self._first_step[stage.name] + step,
    }
