"""Measures this machine.

    python -m experiments.benchmark train --config=configs/laptop.py [--json]
    python -m experiments.benchmark attention [--json]
    python -m experiments.benchmark ring [--json]
    python -m experiments.benchmark tune [--json]

`train` runs the real training loop of each stage on its prepared data for a few steps, and prints
tokens/s, MFU, and the share of the time spent outside the compiled step. `attention` compares
attention with the peers that JAX has on this machine, and decoding with a plain copy. `ring`
measures what balance and skipping save in a ring of eight devices; of eight CPU devices without
others. `tune` times block sizes of each kernel that runs here: `row` of a record is the best, to be
written into kernels/attention/block_sizes_gpu.py or block_sizes_tpu.py beside its head_dim.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import sys
import tempfile

from absl import flags
import jax

from experiments import flags as experiment_flags
from experiments.runtime import use_compilation_cache
from kernels import benchmarks
from lwm.errors import UserError
from lwm.train.benchmark import measure_stage
from lwm.train.peak import peak_flops
from lwm.validate import check_devices
from lwm.validate import validate

_CONFIG = experiment_flags.define_config(required=False)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")
_STEPS = flags.DEFINE_integer("steps", 6, "Steps a round.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds of each stage.", lower_bound=1)
_STAGES = flags.DEFINE_list("stages", [], "Names of the stages to measure; all unless given.")


def train() -> None:
  """The subcommand `train`."""
  experiment = _CONFIG.value
  if experiment is None:
    raise UserError("train: give the experiment to measure, --config=FILE.")
  validate(experiment)
  check_devices(experiment, jax.device_count())
  use_compilation_cache()
  names = [stage.name for stage in experiment.stages]
  for name in _STAGES.value:
    if name not in names:
      raise UserError(f"--stages={name}: the experiment's stages are {', '.join(names)}.")
  speeds = []
  for index, stage in enumerate(experiment.stages):
    if _STAGES.value and stage.name not in _STAGES.value:
      continue
    stage.steps = max(stage.steps, (_ROUNDS.value + 1) * _STEPS.value)
    # The loop's own lines are part of what is measured, but not of the answer.
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(sys.stderr):
      speeds.append(measure_stage(
          experiment, index, pathlib.Path(workdir), rounds=_ROUNDS.value, steps=_STEPS.value
      ))
  peak = peak_flops(jax.devices()[0], experiment.model.compute_dtype)
  if _JSON.value:
    print(json.dumps({
        "machine": machine(),
        "peak_flops_per_device": peak,
        "stages": [dataclasses.asdict(speed) for speed in speeds],
    }))
    return
  print(f"{machine()}; peak {format(peak / 1e9, '.0f') if peak else 'unknown'} GFLOP/s a device")
  print(f"{'stage':<12} {'length':>7} {'tokens/s':>9} {'MFU':>7} {'step':>8} {'compiled':>9} "
        f"{'outside':>8}")
  for speed in speeds:
    mfu = f"{speed.mfu:.1%}" if speed.mfu else "-"
    print(f"{speed.stage:<12} {speed.sequence_length:>7} {speed.tokens_per_second:>9.0f} {mfu:>7} "
          f"{speed.step_seconds:>6.3f} s {speed.compiled_step_seconds:>7.3f} s "
          f"{speed.outside:>8.1%}")
  print("MFU: model FLOPs (lwm/train/flops.py) over the peak (lwm/train/peak.py).\n"
        "Outside: share of the loop's time that the compiled step, run alone on the same batches, "
        "does not take.")


def machine() -> str:
  """The devices, in words."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{jax.device_count()} x {device.device_kind}"
  model = platform.processor()
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((l.split(":")[1].strip() for l in lines if l.startswith("model name")), model)
  return f"{len(os.sched_getaffinity(0))} cores of {model}, {jax.device_count()} JAX device(s)"


def attention() -> None:
  """The subcommand `attention`."""
  platform = jax.devices()[0].platform
  print_records({
      "attention": [
          record
          for shape in benchmarks.shapes(platform)
          for record in benchmarks.measure_attention(shape)
      ],
      "decode": [
          record
          for cache in benchmarks.caches(platform)
          for record in benchmarks.measure_decode(cache)
      ],
  })


def tune() -> None:
  """The subcommand `tune`."""
  platform = jax.devices()[0].platform
  shape = benchmarks.shapes(platform)[0]
  head_dims = (shape.head_dim,) if platform == "cpu" else (64, 128, 256)
  records = list(benchmarks.measure_sizes(
      [dataclasses.replace(shape, head_dim=head_dim) for head_dim in head_dims],
      benchmarks.caches(platform),
  ))
  print_records({"tune": records})


def ring() -> None:
  """The subcommand `ring`."""
  jax.config.update("jax_num_cpu_devices", 8)
  print_records({"ring": benchmarks.measure_ring()})


def print_records(tables: dict[str, list[dict]]) -> None:
  """As JSON, or a line a record."""
  if _JSON.value:
    print(json.dumps({"machine": machine(), **tables}))
    return
  print(machine())
  for name, records in tables.items():
    for record in records:
      texts = (
          f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
          for key, value in record.items() if value is not None
      )
      print(f"{name}: {', '.join(texts)}")


SUBCOMMANDS = {"train": train, "attention": attention, "ring": ring, "tune": tune}


def main(argv: list[str]) -> None:
  if len(argv) != 2 or argv[1] not in SUBCOMMANDS:
    raise UserError(f"say what to measure: {', '.join(SUBCOMMANDS)}.")
  SUBCOMMANDS[argv[1]]()


if __name__ == "__main__":
  experiment_flags.run(main)
