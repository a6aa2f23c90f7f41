"""Speed of the real training loop: beside its compiled step, and what the planner makes of that."""

import dataclasses
import pathlib
import statistics
import time

import jax
import numpy as np

from lwm.checkpoint.checkpoints import Checkpoints
from lwm.checkpoint.position import Position
from lwm.config.experiment import Experiment
from lwm.cost.chips import of_kind
from lwm.data import Loader
from lwm.plan import Topology, load
from lwm.plan.roofline import estimate
from lwm.program.stage import build_program
from lwm.report.metrics import FILE_NAME, read_metrics
from lwm.report.reporter import Reporter
from lwm.train.loop import compile_train_step, run_steps
from lwm.train.stop import StopNotice


@dataclasses.dataclass(frozen=True)
class StageSpeed:
  """Medians over the rounds of a measurement.

  Attributes:
    stage: its name.
    sequence_length: tokens in a row.
    tokens_per_second: of the loop, padding not counted.
    mfu: model FLOPs utilisation of the loop (see flops.py and peak.py), or None if the peak of the
      device is not known.
    step_seconds: a step in the loop: wall time, with data, reports and files.
    compiled_step_seconds: the compiled step alone, run back to back on the same batches.
    outside: share of the loop's time that the compiled step alone does not take.
    estimated_step_seconds: what the planner's roofline says of this machine (lwm/plan/roofline.py),
      or None if it has no figures for its devices.
    estimate_ratio: compiled_step_seconds over estimated_step_seconds.
  """

  stage: str
  sequence_length: int
  tokens_per_second: float
  mfu: float | None
  step_seconds: float
  compiled_step_seconds: float
  outside: float
  estimated_step_seconds: float | None
  estimate_ratio: float | None


def measure_stage(
  experiment: Experiment,
  index: int,
  workdir: pathlib.Path,
  topology: Topology | None,
  *,
  rounds: int,
  steps: int,
) -> StageSpeed:
  """Measures stage `index` from random parameters, on its real data.

  Each round runs `steps` steps through the loop, then the compiled step alone on the same batches;
  so both see the same work and the same machine. The loader's buffer is full when either begins.

  Args:
    experiment: validated; the stage must have (rounds + 1) x steps steps.
    index: of the stage.
    workdir: for the loop's files; metrics of this measurement only.
    topology: of `this_machine`.
    rounds: measured rounds; one more warms up.
    steps: steps a round.
  """
  stage = experiment.stages[index]
  program = build_program(experiment, stage)
  done = Position(stage=index, step=0, total_steps=0)
  reporter = Reporter(experiment, workdir, done)
  loop_seconds, alone_seconds, tokens, mfus = [], [], [], []
  with (
    jax.set_mesh(program.mesh),
    StopNotice() as notice,
    Checkpoints(workdir / "checkpoints", keep=1) as checkpoints,
  ):
    loader = Loader(experiment, index, program.mesh)
    train_step = compile_train_step(program, stage, reporter)
    state = program.fresh_state(program.initial_params(experiment.seed))
    batches = loader.iterate()
    for round_ in range(rounds + 1):
      window = range(round_ * steps, (round_ + 1) * steps)
      started = time.perf_counter()
      state, done, _ = run_steps(
        experiment.faults,
        train_step,
        batches,
        state,
        stage,
        done,
        window.stop,
        reporter,
        checkpoints,
        notice,
      )
      loop_seconds.append(time.perf_counter() - started)
      records = read_metrics(workdir / FILE_NAME)
      records = [record for record in records if record["kind"] == "train"][-steps:]
      tokens.append(sum(record["tokens"] for record in records))
      mfus.append([record["mfu"] * record["seconds"] for record in records if "mfu" in record])

      same = [loader.batch(step) for step in window]
      jax.block_until_ready(same)
      started = time.perf_counter()
      for batch in same:
        state, metrics = train_step(state, batch, np.float32(np.inf))
      jax.block_until_ready((state, metrics))
      alone_seconds.append(time.perf_counter() - started)
    batches.close()
  reporter.close()

  loop_seconds, alone_seconds, tokens, mfus = (
    measured[1:] for measured in (loop_seconds, alone_seconds, tokens, mfus)
  )
  median = statistics.median
  compiled = median(alone_seconds) / steps
  estimated = topology and estimate(experiment, stage, program.mesh, topology).step_seconds
  return StageSpeed(
    stage=stage.name,
    sequence_length=stage.sequence_length,
    tokens_per_second=median(t / s for t, s in zip(tokens, loop_seconds)),
    mfu=median(sum(m) / s for m, s in zip(mfus, loop_seconds)) if mfus[0] else None,
    step_seconds=median(loop_seconds) / steps,
    compiled_step_seconds=compiled,
    outside=median(1 - a / s for a, s in zip(alone_seconds, loop_seconds)),
    estimated_step_seconds=estimated,
    estimate_ratio=estimated and compiled / estimated,
  )


def this_machine() -> Topology | None:
  """The machine that JAX runs on, for the planner; None if lwm/cost/chips.py lacks its devices."""
  devices = tuple(jax.devices())
  if devices[0].platform == "cpu":
    return load(f"cpu:{len(devices)}")
  chip = of_kind(devices[0].device_kind)
  if chip is None or not chip.is_tpu:
    return chip and Topology("here", chip, devices, devices_per_host=jax.local_device_count())
  torus = tuple(1 + max(places) - min(places) for places in zip(*(d.coords for d in devices)))
  return Topology("here", chip, devices, torus=torus)
