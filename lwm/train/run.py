"""One attempt at an experiment in its working directory: what stays the same from step to step."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from lwm.checkpoint.checkpoints import Checkpoints
from lwm.checkpoint.position import START, Position
from lwm.checkpoint.reader import DIRECTORY
from lwm.config.experiment import AnyExperiment
from lwm.errors import ResumeError
from lwm.program.stage import StageProgram
from lwm.program.state import TrainState
from lwm.report.reporter import Reporter
from lwm.train.disk import bad_disk_explained
from lwm.train.faults import check_tolerated
from lwm.train.stop import StopNotice
from lwm.train.task import task_of
from lwm.train.workdir import held


class Run:
  """Owns the experiment and everything that lasts as long as the attempt.

      with Run(experiment, workdir) as run:
        ...

  Attributes:
    experiment: validated, and checked against the devices.
    task: what depends on the kind of experiment.
    workdir: created if needed; held by this run alone while the `with` lasts.
    devices: all devices unless given.
    identity: what a checkpoint must agree with.
    notice: whether the run was asked to stop.
    checkpoints: of the workdir.
    reporter: tells people and tools what happens.
    resumed: the position of the workdir's checkpoint when the attempt began, or None.
  """

  def __init__(
    self,
    experiment: AnyExperiment,
    workdir: pathlib.Path,
    devices: Sequence[jax.Device] | None = None,
    profile_steps: range = range(0),
  ):
    """
    Args:
      experiment: see above.
      workdir: see above.
      devices: see above.
      profile_steps: steps to trace into WORKDIR/profile, counted over all stages from 1.

    Raises:
      UserError: data are missing, or do not fit the experiment.
    """
    self.experiment = experiment
    self.workdir = workdir
    self.devices = devices
    self.task = task_of(experiment)
    self.identity = self.task.identity()
    self.notice = StopNotice()
    self._profile_steps = profile_steps

  def __enter__(self) -> "Run":
    """Takes the workdir, and looks for what an earlier attempt left in it.

    Raises:
      UserError: the workdir belongs to another experiment or cannot be used (see workdir.py).
      ResumeError: another run uses the workdir.
    """
    experiment = self.experiment
    with contextlib.ExitStack() as stack:
      stack.enter_context(self.notice)
      stack.enter_context(bad_disk_explained(self.workdir))
      stack.enter_context(held(self.workdir))
      self.checkpoints = stack.enter_context(
        Checkpoints(self.workdir / DIRECTORY, experiment.checkpoint.keep)
      )
      self.resumed, notes = self.checkpoints.latest(self.identity)
      position = self.resumed or START
      self.reporter = Reporter(self.task.presentation, self.workdir, position, self._profile_steps)
      for note in notes:
        self.reporter.fault(experiment.stages[position.stage], position, "checkpoint", note)
      self._stack = stack.pop_all()
    return self

  def __exit__(self, error_type: Any, error: Any, traceback: Any) -> bool | None:
    return self._stack.__exit__(error_type, error, traceback)

  def first_state(
    self, program: StageProgram, stage: int, checkpoint: Position | None
  ) -> tuple[TrainState, Position]:
    """The state that a stage starts with or resumes from, and where that is.

    This is the order of precedence for a run's parameters:

    1. A checkpoint of the workdir. Inside the stage it gives the whole state; from the end of the
       stage before it gives the parameters.
    2. `init_from` of the experiment: the parameters of another run (see `Task.initial_params`).
    3. Random parameters drawn from the experiment's seed.

    Args:
      program: of the stage.
      stage: its index.
      checkpoint: position of the checkpoint to use, or None.
    """
    if checkpoint is None:
      params, origin = self.task.initial_params(program, self.identity)
      if origin:
        self.reporter.say(origin)
      return program.fresh_state(params), START
    if checkpoint.stage == stage:
      return self.checkpoints.restore(checkpoint, program.state), checkpoint
    params = self.checkpoints.restore_params(checkpoint, program.state.params)
    return program.fresh_state(params), checkpoint.at_stage(stage)

  def save(self, state: TrainState, position: Position) -> None:
    """Starts to write a checkpoint."""
    with self.reporter.account.spend("checkpoint"):
      # Metrics first: every step before a checkpoint must be on record.
      self.reporter.sync()
      self.checkpoints.save(state, position, self.identity)

  def finish_saving(self) -> None:
    """Returns once the last checkpoint is complete."""
    with self.reporter.account.spend("checkpoint"):
      self.checkpoints.wait()

  def end_if_stopped(self, position: Position) -> None:
    """Raises a ResumeError if the run was asked to stop and has steps left."""
    if not self.notice.reason or position.total_steps == self.reporter.total_steps:
      return
    self.finish_saving()
    self.reporter.close()
    raise ResumeError(
      f"{self.notice.reason}: stopped after step {position.total_steps} of "
      f"{self.reporter.total_steps}; run the same command again to resume from "
      f"{self.checkpoints.newest or 'the start'}."
    )

  def check_tolerated(self, in_a_row: int, what: str) -> None:
    """Raises a UserError unless the policy tolerates this bad step.

    Args:
      in_a_row: number of bad steps, or of rollbacks, in a row, including this one.
      what: which step is bad, and why.
    """
    check_tolerated(self.experiment.faults, in_a_row, what, self.checkpoints.newest)
