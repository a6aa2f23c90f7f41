"""The run: stage after stage, step after step, from wherever the working directory stands.

One step is always in flight: while step n runs, the host reports on n - 1, fetches the batch of
n + 1 and dispatches it. The device waits only where it must: for an evaluation's data, and for the
copy that a checkpoint takes.
"""

import hashlib
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lwm.checkpoint.checkpoints import Checkpoints
from lwm.checkpoint.identity import Identity
from lwm.checkpoint.position import Position
from lwm.config.experiment import Experiment, FaultConfig, Stage
from lwm.data import Dataset, Loader, load_tokenizer
from lwm.data.dataset import VALIDATION
from lwm.errors import ResumeError
from lwm.program.stage import StageProgram, build_program
from lwm.program.state import TrainState
from lwm.report import held_out as held_out_lib
from lwm.report.goodput import wall_clock
from lwm.report.input_wait import InputWait
from lwm.report.reporter import Reporter
from lwm.report.terminal import duration
from lwm.train.disk import bad_disk_explained
from lwm.train.faults import check_tolerated, loss_limit, problem, with_loss
from lwm.train.out_of_memory import explain_out_of_memory
from lwm.train.stop import StopNotice
from lwm.train.workdir import held

NOTHING_DONE = Position(stage=0, step=0, total_steps=0)


def train(
  experiment: Experiment,
  workdir: pathlib.Path,
  devices: Sequence[jax.Device] | None = None,
  profile_steps: range = range(0),
) -> None:
  """Trains all stages that are not done yet, leaving checkpoints, metrics and curves in `workdir`.

  Args:
    experiment: validated, and checked against the devices.
    workdir: made if need be. What it holds decides where the run starts: see checkpoint.py.
    devices: all that there are unless given.
    profile_steps: to trace into WORKDIR/profile, counted over all stages from 1.

  Raises:
    UserError: the workdir belongs to another experiment or is of no use (see workdir.py), or data
      or tokenizer are not there or damaged, a bad step ends the run (see FaultConfig), or a
      device's memory is too small.
    ResumeError: the run was told to stop and has left a checkpoint, or cannot write to the disk,
      or another run is in the workdir.
  """
  identity = run_identity(experiment)
  with (
    StopNotice() as notice,
    bad_disk_explained(workdir),
    held(workdir),
    Checkpoints(workdir / "checkpoints", experiment.checkpoint.keep) as checkpoints,
  ):
    checkpoint, notes = checkpoints.latest(identity)
    done = checkpoint or NOTHING_DONE
    reporter = Reporter(experiment, workdir, done, profile_steps)
    for note in notes:
      reporter.fault(experiment.stages[done.stage], done, "checkpoint", note)
    if checkpoint:
      reporter.say(f"resuming {workdir} after step {done.total_steps} of {reporter.total_steps}")

    state = None
    for index in range(done.stage, len(experiment.stages)):
      stage = experiment.stages[index]
      if done.stage < index or done.step < stage.steps:
        program = build_program(experiment, stage, devices)
        with jax.set_mesh(program.mesh), explain_out_of_memory(workdir, stage):
          if state is None:
            state, done = take_up(program, experiment, index, checkpoint, checkpoints)
          else:
            # The old moments go before the new ones come.
            params, state = state.params, None
            params = program.place_params(params)
            state = program.fresh_state(params)
            done = done.at_stage(index)
          loader = Loader(experiment, index, program.mesh)
          for line in loader.report():
            reporter.say(line)
          state, done = train_stage(
            experiment, program, loader, state, done, reporter, checkpoints, identity, notice
          )
      reporter.plot(stage)
    with reporter.account.spend("checkpoint"):
      checkpoints.wait()
    reporter.finish(checkpoints.path(done.total_steps))


def take_up(
  program: StageProgram,
  experiment: Experiment,
  index: int,
  checkpoint: Position | None,
  checkpoints: Checkpoints,
) -> tuple[TrainState, Position]:
  """The state that stage `index` goes on from, or starts with, and where that is."""
  if checkpoint is None:
    return program.fresh_state(program.initial_params(experiment.seed)), NOTHING_DONE
  if checkpoint.stage == index:
    return checkpoints.restore(checkpoint, program.state), checkpoint
  params = checkpoints.restore_params(checkpoint, program.state.params)
  return program.fresh_state(params), checkpoint.at_stage(index)


def train_stage(
  experiment: Experiment,
  program: StageProgram,
  loader: Loader,
  state: TrainState,
  done: Position,
  reporter: Reporter,
  checkpoints: Checkpoints,
  identity: Identity,
  notice: StopNotice,
) -> tuple[TrainState, Position]:
  """The rest of a stage, with an evaluation and a checkpoint at its end, whatever their periods."""
  stage = experiment.stages[done.stage]
  with reporter.account.spend("compile"):
    train_step = compile_train_step(program, stage, reporter)
  batches, rollbacks = None, 0
  while done.step < stage.steps:
    stop = min(
      stage.steps,
      next_multiple(done.step, experiment.checkpoint.every_steps),
      next_multiple(done.step, experiment.evaluation.every_steps),
    )
    if batches is None:
      batches = loader.iterate(done.next_batch, done.next_batch + stage.steps - done.step)
    before = done
    state, done, bad = run_steps(
      experiment.faults,
      train_step,
      batches,
      state,
      stage,
      done,
      stop,
      reporter,
      checkpoints,
      notice,
    )
    if bad or done.passed_over != before.passed_over:
      batches = None
    if bad and not notice.reason:
      rollbacks += 1
      check_tolerated(experiment.faults, rollbacks, f"{stage.name}, {bad}", checkpoints.newest)
      # This state goes before the other comes.
      state = None
      with reporter.account.spend("restart"):
        state, done = roll_back(experiment, program, done, bad, reporter, checkpoints, identity)
      continue
    last = done.step == stage.steps
    if last or (done.step == stop and stop % experiment.evaluation.every_steps == 0):
      with reporter.account.spend("evaluation"):
        reporter.evaluation(stage, stop, held_out(program, loader, state))
    at_period = done.step == stop and stop % experiment.checkpoint.every_steps == 0
    if last or at_period or (notice.reason and done.step and not bad):
      with reporter.account.spend("checkpoint"):
        # Metrics first: a checkpoint stands for steps that are all on record.
        reporter.sync()
        checkpoints.save(state, done, identity)
      rollbacks = 0
    if notice.reason and done.total_steps < reporter.total_steps:
      with reporter.account.spend("checkpoint"):
        checkpoints.wait()
      reporter.close()
      raise ResumeError(
        f"{notice.reason}: stopped after step {done.total_steps} of {reporter.total_steps}; the "
        f"same command goes on from {checkpoints.newest or 'the start'}."
      )
  return state, done


def run_steps(
  faults: FaultConfig,
  train_step: Any,
  batches: Iterator[dict[str, jax.Array]],
  state: TrainState,
  stage: Stage,
  done: Position,
  stop: int,
  reporter: Reporter,
  checkpoints: Checkpoints,
  notice: StopNotice,
) -> tuple[TrainState, Position, str | None]:
  """Runs as many batches as there are steps to `stop`, unless told to stop, and reports each.

  The device is idle only at the end.

  Returns:
    The state and the progress after the last step; and what is wrong with the next one, if it is
    bad and the policy is to roll back: the state is then none to go on from.
  """
  in_flight, bad = None, None
  first = done.next_batch
  reporter.start_clock()
  for index in range(first, first + stop - done.step):
    checkpoints.check()
    if notice.reached():
      break
    limit = loss_limit(faults, done.losses, index)
    with reporter.dispatch(done.total_steps + (in_flight is not None) + 1):
      asked = wall_clock()
      batch = next(batches)
      came = wall_clock()
      state, metrics = train_step(state, batch, limit)
    wait = InputWait(asked, came, metrics)
    if in_flight:
      done, bad = settle(faults, stage, done, *in_flight, reporter, checkpoints)
      if bad:
        return state, done, bad
    in_flight = limit, metrics, wait
  if in_flight:
    done, bad = settle(faults, stage, done, *in_flight, reporter, checkpoints)
  return state, done, bad


def settle(
  faults: FaultConfig,
  stage: Stage,
  done: Position,
  limit: float,
  metrics: dict[str, jax.Array],
  wait: InputWait,
  reporter: Reporter,
  checkpoints: Checkpoints,
) -> tuple[Position, str | None]:
  """Waits for the step of batch `done.next_batch`.

  Returns:
    The progress after it; and what is wrong with it, if it is bad and the policy is to roll back.
  """
  metrics = jax.device_get(metrics)
  index = done.next_batch
  if metrics.pop("applied"):
    done = done.after_step(with_loss(faults, done.losses, index, metrics["loss"].item()))
    reporter.step(stage, done.step, metrics, wait)
    return done, None
  bad = f"step {done.step + 1}, of batch {index}: {problem(faults, metrics, limit)}"
  if faults.bad_step == "rollback":
    return done, bad
  done = done.passing_over(index + 1)
  check_tolerated(faults, done.just_passed_over, f"{stage.name}, {bad}", checkpoints.newest)
  reporter.fault(stage, done, "skip", f"{bad}; the batch is skipped")
  return done, None


def roll_back(
  experiment: Experiment,
  program: StageProgram,
  done: Position,
  bad: str,
  reporter: Reporter,
  checkpoints: Checkpoints,
  identity: Identity,
) -> tuple[TrainState, Position]:
  """The state of the last checkpoint, from where the batches up to the bad one are passed over."""
  stage = experiment.stages[done.stage]
  checkpoint, notes = checkpoints.latest(identity)
  start_of_stage = done.total_steps - done.step
  if checkpoint and checkpoint.total_steps < start_of_stage:
    raise ResumeError(
      f"{stage.name}, {bad}, and {' and '.join(notes)}, in an earlier stage: start the same "
      "command again."
    )
  state, back = take_up(program, experiment, done.stage, checkpoint, checkpoints)
  first, stop = back.next_batch, done.next_batch + 1
  back = back.passing_over(stop)
  reporter.rewind(back)
  for note in notes:
    reporter.fault(stage, back, "checkpoint", note)
  reporter.fault(
    stage,
    back,
    "rollback",
    f"{bad}; back to step {back.step}, passing over batches {first} to {stop - 1}",
  )
  return state, back


def compile_train_step(program: StageProgram, stage: Stage, reporter: Reporter) -> Any:
  """The train step, compiled before the first batch so that its time is not a step's."""
  started = time.perf_counter()
  batch = program.abstract_batch(stage.rows_per_batch, stage.sequence_length)
  limit = jax.ShapeDtypeStruct((), jnp.float32)
  compiled = program.train_step.lower(program.state, batch, limit).compile()
  axes = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1)
  reporter.say(
    f"{stage.name}: {stage.sequence_length} tokens x {stage.rows_per_batch} rows, mesh "
    f"{axes or 'of one device'}, compiled in {duration(time.perf_counter() - started)}"
  )
  return compiled


def held_out(program: StageProgram, loader: Loader, state: TrainState) -> list[dict[str, Any]]:
  """Held-out losses of the stage's datasets: see held_out_lib.py."""
  return [
    row
    for name in loader.evaluation_datasets
    for row in held_out_lib.held_out_losses(
      state.params,
      program.evaluation_step,
      loader.evaluation_batches(name),
      name,
      loader.datasets[name].unigram_entropy(VALIDATION),
    )
  ]


def next_multiple(step: int, period: int) -> int:
  """The first multiple of `period` after `step`."""
  return (step // period + 1) * period


def run_identity(experiment: Experiment) -> Identity:
  """Reads what tells this run from others. Raises UserError if data or tokenizer are not there."""
  tokenizer = load_tokenizer(experiment.tokenizer)
  manifests = {}
  for config in experiment.datasets:
    dataset = Dataset(config.path)
    dataset.check_tokenizer(tokenizer)
    text = json.dumps(dataset.manifest, sort_keys=True)
    manifests[config.name] = hashlib.sha256(text.encode()).hexdigest()
  return Identity(experiment, tokenizer.path.read_bytes(), manifests)
