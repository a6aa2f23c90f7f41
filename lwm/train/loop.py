"""The run: stage after stage, step after step, from wherever the working directory stands.

One step is always in flight: while step n runs, the host reports on n - 1, fetches the batch of
n + 1 and dispatches it. The device waits only where it must: for an evaluation's data, and for the
copy that a checkpoint takes.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import hashlib
import json
import pathlib
import time
from typing import Any

import jax

from lwm.data import Dataset
from lwm.data import load_tokenizer
from lwm.data import Loader
from lwm.data.dataset import VALIDATION
from lwm.experiment import Experiment
from lwm.experiment import Stage
from lwm.train import evaluate
from lwm.train.checkpoint import Checkpoints
from lwm.train.checkpoint import Identity
from lwm.train.checkpoint import Progress
from lwm.train.program import StageProgram
from lwm.train.program import build_program
from lwm.train.progress import duration
from lwm.train.report import Reporter
from lwm.train.state import TrainState


def train(
    experiment: Experiment, workdir: pathlib.Path, devices: Sequence[jax.Device] | None = None
) -> None:
  """Trains all stages that are not done yet, leaving checkpoints, metrics and curves in `workdir`.

  Args:
    experiment: validated, and checked against the devices.
    workdir: made if need be. What it holds decides where the run starts: see checkpoint.py.
    devices: all that there are unless given.

  Raises:
    UserError: the workdir belongs to another experiment, or data or tokenizer are not there.
  """
  identity = run_identity(experiment)
  checkpoints = Checkpoints(workdir / "checkpoints", experiment.checkpoint.keep)
  done = checkpoints.latest(identity) or Progress(stage=0, step=0, total_steps=0)
  reporter = Reporter(experiment, workdir, done)
  if done.total_steps:
    reporter.say(f"resuming {workdir} after step {done.total_steps} of {reporter.total_steps}")

  state = None
  for index in range(done.stage, len(experiment.stages)):
    stage = experiment.stages[index]
    program = build_program(experiment, stage, devices)
    with jax.set_mesh(program.mesh):
      if state is None and done.total_steps:
        state = checkpoints.restore(done, program.state)
      elif state is None:
        state = program.fresh_state(program.initial_params(experiment.seed))
      else:
        # The old moments go before the new ones come.
        params, state = state.params, None
        params = program.place_params(params)
        state = program.fresh_state(params)
        done = Progress(stage=index, step=0, total_steps=done.total_steps)
      if done.step < stage.steps:
        state, done = train_stage(
            experiment, program, Loader(experiment, index, program.mesh), state, done, reporter,
            checkpoints, identity,
        )
    reporter.plot(stage)
  checkpoints.wait()
  checkpoints.close()
  reporter.finish(workdir / "checkpoints" / str(done.total_steps))


def train_stage(
    experiment: Experiment,
    program: StageProgram,
    loader: Loader,
    state: TrainState,
    done: Progress,
    reporter: Reporter,
    checkpoints: Checkpoints,
    identity: Identity,
) -> tuple[TrainState, Progress]:
  """The rest of a stage, with an evaluation and a checkpoint at its end, whatever their periods."""
  stage = experiment.stages[done.stage]
  train_step = compile_train_step(program, stage, reporter)
  batches = loader.iterate(done.step)
  while done.step < stage.steps:
    stop = min(
        stage.steps,
        next_multiple(done.step, experiment.checkpoint.every_steps),
        next_multiple(done.step, experiment.evaluation.every_steps),
    )
    state = run_steps(train_step, batches, state, stage, range(done.step, stop), reporter)
    done = Progress(done.stage, stop, done.total_steps + stop - done.step)
    last = stop == stage.steps
    if last or stop % experiment.evaluation.every_steps == 0:
      reporter.evaluation(stage, stop, held_out(program, loader, state))
    if last or stop % experiment.checkpoint.every_steps == 0:
      # Metrics first: a checkpoint stands for steps that are all on record.
      reporter.sync()
      checkpoints.save(state, done, identity)
  return state, done


def run_steps(
    train_step: Any,
    batches: Iterator[dict[str, jax.Array]],
    state: TrainState,
    stage: Stage,
    steps: range,
    reporter: Reporter,
) -> TrainState:
  """Runs `steps` and reports each; the device is idle only at the end."""
  in_flight = None
  reporter.start_clock()
  for step in steps:
    started = time.perf_counter()
    batch = next(batches)
    data_seconds = time.perf_counter() - started
    state, metrics = train_step(state, batch)
    if in_flight:
      reporter.step(stage, *in_flight)
    in_flight = step + 1, metrics, data_seconds
  reporter.step(stage, *in_flight)
  return state


def compile_train_step(program: StageProgram, stage: Stage, reporter: Reporter) -> Any:
  """The train step, compiled before the first batch so that its time is not a step's."""
  started = time.perf_counter()
  batch = program.abstract_batch(stage.rows_per_batch, stage.sequence_length)
  compiled = program.train_step.lower(program.state, batch).compile()
  axes = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1)
  reporter.say(
      f"{stage.name}: {stage.sequence_length} tokens x {stage.rows_per_batch} rows, mesh "
      f"{axes or 'of one device'}, compiled in {duration(time.perf_counter() - started)}"
  )
  return compiled


def held_out(program: StageProgram, loader: Loader, state: TrainState) -> list[dict[str, Any]]:
  """Held-out losses of the stage's datasets: see evaluate.py."""
  return [
      row
      for name in loader.evaluation_datasets
      for row in evaluate.held_out_losses(
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
