"""Speed of the real training loop, of its compiled step alone, and what the planner expects."""

import dataclasses
import pathlib
import statistics
import time

import jax
import numpy as np

from lwm.config.experiment import Experiment
from lwm.cost.chips import of_kind
from lwm.plan import Topology, load
from lwm.plan.roofline import estimate
from lwm.program.stage import build_program
from lwm.report.metrics import FILE_NAME, read_metrics
from lwm.train.loop import StageLoop
from lwm.train.run import Run


@dataclasses.dataclass(frozen=True)
class StageSpeed:
  """Medians over the rounds of a measurement.

  Attributes:
    stage: its name.
    sequence_length: tokens per row.
    tokens_per_second: of the loop, without padding.
    mfu: model FLOPs utilisation of the loop (see lwm/model/flops.py and lwm/cost/peak.py), or None
      if the device's peak is unknown.
    step_seconds: wall time per step in the loop, including data, reports and files.
    compiled_step_seconds: time per step of the compiled step alone, run back to back on the same
      batches.
    outside: share of the loop's time that the compiled step alone does not take.
    estimated_step_seconds: the planner's roofline for this machine (lwm/plan/roofline.py), or None
      if the planner does not know its devices.
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
  experiment: Experiment, workdir: pathlib.Path, topology: Topology | None, rounds: int, steps: int
) -> StageSpeed:
  """Measures the only stage of an experiment from random parameters, on its real data.

  Each round runs `steps` steps through the loop, then the compiled step alone on the same batches,
  so that both see the same work and the same machine. The loader's buffer is full when either
  begins.

  Args:
    experiment: validated; its one stage must have at least (rounds + 1) x steps steps.
    workdir: for the loop's files; holds nothing else.
    topology: of `this_machine`.
    rounds: number of measured rounds, after one that warms up.
    steps: number of steps per round.
  """
  (stage,) = experiment.stages
  program = build_program(experiment, stage)
  loop_seconds, alone_seconds, tokens, mfus = [], [], [], []
  with Run(experiment, workdir) as run, jax.set_mesh(program.mesh):
    loop = StageLoop(run, program, 0)
    state, position = run.first_state(program, 0, None)
    for round_ in range(rounds + 1):
      window = range(round_ * steps, (round_ + 1) * steps)
      started = time.perf_counter()
      state, position, _ = loop.run_steps(state, position, window.stop)
      loop_seconds.append(time.perf_counter() - started)
      records = read_metrics(workdir / FILE_NAME)
      records = [record for record in records if record["kind"] == "train"][-steps:]
      tokens.append(sum(record["tokens"] for record in records))
      mfus.append([record["mfu"] * record["seconds"] for record in records if "mfu" in record])

      same = [loop.loader.batch(step) for step in window]
      jax.block_until_ready(same)
      started = time.perf_counter()
      for batch in same:
        state, metrics = loop.train_step(state, batch, np.float32(np.inf))
      jax.block_until_ready((state, metrics))
      alone_seconds.append(time.perf_counter() - started)
    run.reporter.close()

  # Without the round that warms up.
  del loop_seconds[0], alone_seconds[0], tokens[0], mfus[0]
  median = statistics.median
  compiled = median(alone_seconds) / steps
  estimated = None
  if topology is not None:
    estimated = estimate(experiment, stage, program.mesh, topology).step_seconds
  return StageSpeed(
    stage=stage.name,
    sequence_length=stage.sequence_length,
    tokens_per_second=median(t / s for t, s in zip(tokens, loop_seconds)),
    mfu=median(sum(m) / s for m, s in zip(mfus, loop_seconds)) if mfus[0] else None,
    step_seconds=median(loop_seconds) / steps,
    compiled_step_seconds=compiled,
    outside=median(1 - a / s for a, s in zip(alone_seconds, loop_seconds)),
    estimated_step_seconds=estimated,
    estimate_ratio=None if estimated is None else compiled / estimated,
  )


def this_machine() -> Topology | None:
  """The machine that JAX runs on, for the planner; None if lwm/cost/chips.py does not know it."""
  devices = tuple(jax.devices())
  if devices[0].platform == "cpu":
    return load(f"cpu:{len(devices)}")
  chip = of_kind(devices[0].device_kind)
  if chip is None:
    return None
  if not chip.is_tpu:
    return Topology("here", chip, devices, devices_per_host=jax.local_device_count())
  torus = tuple(1 + max(places) - min(places) for places in zip(*(d.coords for d in devices)))
  return Topology("here", chip, devices, torus=torus)
