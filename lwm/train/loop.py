"""The training loop: stage after stage, step after step, from wherever the workdir's run is.

One step is always in flight: while step n runs, the host reports step n - 1, fetches the batch of
step n + 1 and dispatches it. The device waits only for an evaluation's data and for the copy that
a checkpoint takes.
"""

import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lwm.checkpoint.position import START, Position
from lwm.config.experiment import AnyExperiment
from lwm.errors import ResumeError
from lwm.program.stage import StageProgram, build_program
from lwm.program.state import TrainState
from lwm.report.goodput import wall_clock
from lwm.report.input_wait import InputWait
from lwm.report.terminal import duration
from lwm.train.faults import loss_limit, problem, with_loss
from lwm.train.out_of_memory import explain_out_of_memory
from lwm.train.run import Run


def train(
  experiment: AnyExperiment,
  workdir: pathlib.Path,
  devices: Sequence[jax.Device] | None = None,
  profile_steps: range = range(0),
) -> None:
  """Trains all stages that are not done yet, leaving checkpoints, metrics and curves in `workdir`.

  Args:
    experiment: validated, and checked against the devices.
    workdir: created if needed. What it holds decides where the run starts: see `Run.first_state`.
    devices: all devices unless given.
    profile_steps: steps to trace into WORKDIR/profile, counted over all stages from 1.

  Raises:
    UserError: the workdir belongs to another experiment or cannot be used (see workdir.py), data
      are missing or damaged, a bad step ends the run (see FaultConfig), or a device has too little
      memory.
    ResumeError: the run was asked to stop and has left a checkpoint, cannot write to the disk, or
      another run uses the workdir.
  """
  with Run(experiment, workdir, devices, profile_steps) as run:
    position, state = run.resumed or START, None
    if run.resumed:
      run.reporter.say(
        f"resuming {workdir} after step {position.total_steps} of {run.reporter.total_steps}"
      )
    for index in range(position.stage, len(experiment.stages)):
      stage = experiment.stages[index]
      if position.stage < index or position.step < stage.steps:
        program = build_program(experiment, stage, devices)
        advice = run.task.less_memory(stage)
        with jax.set_mesh(program.mesh), explain_out_of_memory(workdir, stage.name, advice):
          if state is None:
            state, position = run.first_state(program, index, run.resumed)
          else:
            # The old moments are freed before the new ones are allocated.
            params, state = state.params, None
            params = program.place_params(params)
            state = program.fresh_state(params)
            position = position.at_stage(index)
          state, position = StageLoop(run, program, index).train(state, position)
      run.reporter.plot(stage)
    run.finish_saving()
    run.reporter.finish(run.checkpoints.path(position.total_steps))


class StageLoop:
  """The steps of one stage of a run. Use it under `jax.set_mesh(program.mesh)`."""

  def __init__(self, run: Run, program: StageProgram, index: int):
    """Opens the stage's data and compiles its step."""
    self.run = run
    self.program = program
    self.stage = run.experiment.stages[index]
    self.loader = run.task.open_loader(index, program.mesh)
    self._faults = run.experiment.faults
    # Batches from the current position on, or None where the position has moved.
    self._batches: Iterator[dict[str, jax.Array]] | None = None
    for line in run.task.notes(program, self.loader):
      run.reporter.say(line)
    with run.reporter.account.spend("compile"):
      self.train_step = self._compile()

  def train(self, state: TrainState, position: Position) -> tuple[TrainState, Position]:
    """Runs the rest of the stage, evaluating and saving by their periods and at its end."""
    run, program, stage = self.run, self.program, self.stage
    evaluate_every = run.experiment.evaluation.every_steps
    save_every = run.experiment.checkpoint.every_steps
    rollbacks = 0
    while position.step < stage.steps:
      stop = min(
        stage.steps,
        next_multiple(position.step, save_every),
        next_multiple(position.step, evaluate_every),
      )
      state, position, bad = self.run_steps(state, position, stop)
      if bad and not run.notice.reason:
        rollbacks += 1
        run.check_tolerated(rollbacks, f"{stage.name}, {bad}")
        # This state is freed before the other one is read.
        del state
        with run.reporter.account.spend("restart"):
          state, position = self._roll_back(position, bad)
        continue
      last = position.step == stage.steps
      if last or (position.step == stop and stop % evaluate_every == 0):
        with run.reporter.account.spend("evaluation"):
          held_out = run.task.held_out(program, self.loader, state.params)
          run.reporter.evaluation(stage, stop, held_out)
          if last:
            for line in run.task.write_results(run.workdir, program, self.loader, state.params):
              run.reporter.say(line)
      at_period = position.step == stop and stop % save_every == 0
      if last or at_period or (run.notice.reason and position.step and not bad):
        run.save(state, position)
        rollbacks = 0
      run.end_if_stopped(position)
    return state, position

  def run_steps(
    self, state: TrainState, position: Position, stop: int
  ) -> tuple[TrainState, Position, str | None]:
    """Runs one batch for each step up to `stop`, unless asked to stop, and reports each step.

    The device is idle only at the end.

    Returns:
      The state and position after the last step, and what is wrong with the next step if it is bad
      and the policy is to roll back. In that case the state must not be used.
    """
    run = self.run
    in_flight: tuple[np.float32, dict[str, Any], InputWait] | None = None
    bad = None
    first, before = position.next_batch, position
    batches = self._batches_from(position)
    run.reporter.start_clock()
    for index in range(first, first + stop - position.step):
      run.checkpoints.check()
      if run.notice.reached():
        break
      limit = loss_limit(self._faults, position.losses, index)
      with run.reporter.dispatch(position.total_steps + (in_flight is not None) + 1):
        asked = wall_clock()
        batch = next(batches)
        came = wall_clock()
        state, metrics = self.train_step(state, batch, limit)
      wait = InputWait(asked, came, metrics)
      if in_flight:
        position, bad = self._settle(position, *in_flight)
        if bad:
          break
      in_flight = limit, metrics, wait
    if in_flight and not bad:
      position, bad = self._settle(position, *in_flight)
    if bad or position.passed_over != before.passed_over:
      self._batches = None
    return state, position, bad

  def _batches_from(self, position: Position) -> Iterator[dict[str, jax.Array]]:
    if self._batches is None:
      start = position.next_batch
      self._batches = self.loader.iterate(start, start + self.stage.steps - position.step)
    return self._batches

  def _settle(
    self, position: Position, limit: np.float32, metrics: dict[str, Any], wait: InputWait
  ) -> tuple[Position, str | None]:
    """Waits for the step that took batch `position.next_batch`.

    Returns:
      The position after it, and what is wrong with it if it is bad and the policy is to roll back.
    """
    faults, reporter = self._faults, self.run.reporter
    metrics = jax.device_get(metrics)
    index = position.next_batch
    if metrics.pop("applied"):
      losses = with_loss(faults, position.losses, index, metrics["loss"].item())
      position = position.after_step(losses)
      reporter.step(self.stage, position.step, metrics, wait)
      return position, None
    bad = f"step {position.step + 1}, of batch {index}: {problem(faults, metrics, limit)}"
    if faults.bad_step == "rollback":
      return position, bad
    position = position.passing_over(index + 1)
    self.run.check_tolerated(position.just_passed_over, f"{self.stage.name}, {bad}")
    reporter.fault(self.stage, position, "skip", f"{bad}; the batch is skipped")
    return position, None

  def _roll_back(self, position: Position, bad: str) -> tuple[TrainState, Position]:
    """The state of the last checkpoint, with the batches up to the bad one skipped."""
    run, stage = self.run, self.stage
    checkpoint, notes = run.checkpoints.latest(run.identity)
    start_of_stage = position.total_steps - position.step
    if checkpoint and checkpoint.total_steps < start_of_stage:
      raise ResumeError(
        f"{stage.name}, {bad}, and {' and '.join(notes)}, in an earlier stage: run the same "
        "command again."
      )
    state, back = run.first_state(self.program, position.stage, checkpoint)
    first, stop = back.next_batch, position.next_batch + 1
    back = back.passing_over(stop)
    run.reporter.rewind(back)
    for note in notes:
      run.reporter.fault(stage, back, "checkpoint", note)
    text = f"{bad}; back to step {back.step}, skipping batches {first} to {stop - 1}"
    run.reporter.fault(stage, back, "rollback", text)
    return state, back

  def _compile(self) -> Any:
    """Compiles the train step before the first batch, so that no step's time includes it."""
    program, stage = self.program, self.stage
    started = time.perf_counter()
    compiled = program.traced.lower().compile()
    axes = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1)
    self.run.reporter.say(
      f"{stage.name}: {self.run.task.batch_text(stage)}, mesh {axes or 'of one device'}, compiled "
      f"in {duration(time.perf_counter() - started)}"
    )
    return compiled


def next_multiple(step: int, period: int) -> int:
  """The first multiple of `period` after `step`."""
  return (step // period + 1) * period
