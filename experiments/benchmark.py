"""Measures the speed of training and of the kernels on this machine.

    python -m experiments.benchmark train --config=configs/laptop.py [--json]
    python -m experiments.benchmark attention [--json]
    python -m experiments.benchmark quantised [--json]
    python -m experiments.benchmark ring [--json]
    python -m experiments.benchmark experts [--json]
    python -m experiments.benchmark tune [--kernels=forward,decode] [--head_dim=64] [--json]
    python -m experiments.benchmark weights [--json]
    python -m experiments.benchmark generate --config=configs/laptop.py [--contexts=4096] [--json]

`train` runs the real training loop of each stage for a few steps on its prepared data. It prints
tokens/s, MFU, the share of time spent outside the compiled step, and how long that step takes
compared with the planner's estimate. `attention` compares attention with JAX's other
implementations on this machine, and decoding with a plain copy. `quantised` compares products with
matrices of 8-bit and 4-bit codes with the same product in floats. `ring` measures how much time the
zigzag layout and skipped blocks save in a ring of up to eight devices; a machine without
accelerators uses eight CPU devices. `experts` compares the grouped products of experts with JAX's
and, on two to eight devices, a skewed router under each placement of experts with a balanced one.
`tune` times block sizes of each kernel that runs here. The `row` of a record is the fastest choice:
write it into
kernels/attention/BACKEND/block_sizes.py, under its head_dim. `weights` imports and exports a random
model of 3.2 billion parameters, which needs 20 GB in TMPDIR. `generate` reads prompts and generates
tokens with the model of --workdir, or with random weights of the model of --config, on all devices:
tokens/s, shares of the peak and of the memory bandwidth, and the speed of a loop without a cache.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Iterable

import jax
from absl import flags

from experiments import flags as experiment_flags
from experiments.runtime import devices, use_compilation_cache
from kernels import benchmarks
from lwm import infer
from lwm.benchmark import measure_stage, this_machine
from lwm.checkpoint.reader import newest
from lwm.config.experiment import Experiment
from lwm.config.validate import check_devices, check_model_fits_mesh, validate
from lwm.convert import benchmark as conversions
from lwm.cost.peak import peak_flops
from lwm.errors import UserError
from lwm.infer.benchmark import measure_generation, random_params
from lwm.model import build
from lwm.model.experts_benchmark import measure_placement
from lwm.parallel import xla_flags
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules

_CONFIG = experiment_flags.define_config(required=False)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")
_STEPS = flags.DEFINE_integer("steps", 6, "Steps per round.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds per stage.", lower_bound=1)
_STAGES = flags.DEFINE_list("stages", [], "Names of the stages to measure [all].")
_KERNELS = flags.DEFINE_list("kernels", [], "Names of the kernels to tune [all].")
_HEAD_DIM = flags.DEFINE_integer(
  "head_dim", None, "Head dimension to tune for [the one that `attention` measures]."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "A run or imported weights, for `generate`.")
_CONTEXTS = flags.DEFINE_list("contexts", ["1024", "8192"], "Tokens of the prompts of `generate`.")


def train() -> None:
  """Subcommand `train`: the speed of each stage's training loop."""
  experiment = _CONFIG.value
  if experiment is None:
    raise UserError("train: name the experiment to measure with --config=FILE.")
  if not isinstance(experiment, Experiment):
    raise UserError("train: this measures language models; name the config of one.")
  validate(experiment)
  check_devices(experiment, len(devices()))
  use_compilation_cache()
  names = [stage.name for stage in experiment.stages]
  for name in _STAGES.value:
    if name not in names:
      raise UserError(f"--stages={name}: the experiment's stages are {', '.join(names)}.")
  speeds = []
  topology = this_machine()
  for stage in experiment.stages:
    if _STAGES.value and stage.name not in _STAGES.value:
      continue
    stage.steps = max(stage.steps, (_ROUNDS.value + 1) * _STEPS.value)
    # The lines that the loop prints are part of what is measured, but not of the result.
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(sys.stderr):
      speeds.append(
        measure_stage(
          dataclasses.replace(experiment, stages=[stage]),
          pathlib.Path(workdir),
          topology,
          _ROUNDS.value,
          _STEPS.value,
        )
      )
  peak = peak_flops(jax.devices()[0], experiment.model.compute_dtype)
  if _JSON.value:
    print(
      json.dumps(
        {
          "machine": machine(),
          "peak_flops_per_device": peak,
          "stages": [dataclasses.asdict(speed) for speed in speeds],
        }
      )
    )
    return
  print(f"{machine()}; peak {format(peak / 1e9, '.0f') if peak else 'unknown'} GFLOP/s per device")
  print(
    f"{'stage':<12} {'length':>7} {'tokens/s':>9} {'MFU':>7} {'step':>8} {'compiled':>9} "
    f"{'outside':>8} {'estimated':>10} {'ratio':>6}"
  )
  for speed in speeds:
    mfu = f"{speed.mfu:.1%}" if speed.mfu else "-"
    estimated = ratio = "-"
    if speed.estimate_ratio:
      estimated = f"{speed.estimated_step_seconds:.3f} s"
      ratio = f"{speed.estimate_ratio:.2f}"
    print(
      f"{speed.stage:<12} {speed.sequence_length:>7} {speed.tokens_per_second:>9.0f} {mfu:>7} "
      f"{speed.step_seconds:>6.3f} s {speed.compiled_step_seconds:>7.3f} s "
      f"{speed.outside:>8.1%} {estimated:>10} {ratio:>6}"
    )
  print(
    "MFU: model FLOPs (lwm/model/flops.py) divided by the peak (lwm/cost/peak.py).\n"
    "Outside: share of the loop's time beyond that of the compiled step, run alone on the same "
    "batches.\n"
    "Estimated: the planner's roofline (lwm/plan/roofline.py). Ratio: compiled / estimated."
  )


def machine() -> str:
  """Describes the devices."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{jax.device_count()} x {device.device_kind}"
  model = platform.processor()
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((l.split(":")[1].strip() for l in lines if l.startswith("model name")), model)
  return f"{len(os.sched_getaffinity(0))} cores of {model}, {jax.device_count()} JAX device(s)"


def attention() -> None:
  """Subcommand `attention`: attention and decoding, compared with JAX's and with a copy."""
  platform = jax.devices()[0].platform
  print_records(
    {
      "attention": itertools.chain.from_iterable(
        map(benchmarks.measure_attention, benchmarks.shapes(platform))
      ),
      "decode": itertools.chain.from_iterable(
        map(benchmarks.measure_decode, benchmarks.caches(platform))
      ),
    }
  )


def quantised() -> None:
  """Subcommand `quantised`: products with quantized matrices beside the same product in floats."""
  products = benchmarks.products(jax.devices()[0].platform)
  records = map(benchmarks.measure_quantised, products)
  print_records({"quantised": itertools.chain.from_iterable(records)})


def weights() -> None:
  """Subcommand `weights`: time and memory of importing and exporting a random 3B model."""
  with tempfile.TemporaryDirectory() as directory:
    records = conversions.measure_conversions(pathlib.Path(directory), conversions.MODEL)
    print_records({"weights": records})


def tune() -> None:
  """Subcommand `tune`: the time of each kernel with each of its block sizes."""
  for name in _KERNELS.value:
    if name not in benchmarks.KERNELS:
      raise UserError(f"--kernels={name}: the kernels are {', '.join(benchmarks.KERNELS)}.")
  platform = jax.devices()[0].platform
  shapes, caches = benchmarks.shapes(platform)[:1], benchmarks.caches(platform)
  if head_dim := _HEAD_DIM.value:
    shapes = tuple(dataclasses.replace(shape, head_dim=head_dim) for shape in shapes)
    caches = tuple(dataclasses.replace(cache, head_dim=head_dim) for cache in caches)
  kernels = _KERNELS.value or benchmarks.KERNELS
  print_records({"tune": benchmarks.measure_sizes(shapes, caches, kernels)})


def ring() -> None:
  """Subcommand `ring`: the time that the zigzag layout and skipped blocks save in a ring."""
  jax.config.update("jax_num_cpu_devices", 8)
  xla_flags.apply()
  print_records({"ring": benchmarks.measure_ring()})


def experts() -> None:
  """Subcommand `experts`: grouped products, and the time that the placement of experts saves."""
  jax.config.update("jax_num_cpu_devices", 8)
  xla_flags.apply()
  cases = benchmarks.groups(jax.devices()[0].platform)
  tables: dict[str, Iterable[dict]] = {
    "product": itertools.chain.from_iterable(map(benchmarks.measure_grouped, cases))
  }
  if jax.device_count() > 1:
    tables["placement"] = measure_placement(min(8, jax.device_count()))
  print_records(tables)


def generate() -> None:
  """Subcommand `generate`: prefill and decode beside the devices' limits and a plain loop."""
  experiment, workdir = _CONFIG.value, _WORKDIR.value
  if (workdir is None) == (experiment is None):
    raise UserError("generate: name one model, with --workdir=DIRECTORY or --config=FILE.")
  contexts = _CONTEXTS.value or []
  if not contexts or not all(text.isdigit() and int(text) > 0 for text in contexts):
    raise UserError(f"--contexts={','.join(contexts)}: give numbers of tokens, such as 1024,8192.")
  if experiment is not None and not isinstance(experiment, Experiment):
    raise UserError("generate: this measures language models; name the config of one.")
  use_compilation_cache()
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1, ring=-1), devices())):
    if experiment is None:
      stored = newest(pathlib.Path(workdir or ""))
      trained = infer.load_stored(stored, stored.experiment.model.compute_dtype)
      model, params, rope_theta = trained.model, trained.params, trained.rope_theta
    else:
      config, rope_theta = experiment.model, experiment.stages[-1].rope_theta
      rules = ShardingRules.inference(few_tokens=True)
      check_model_fits_mesh(config, jax.sharding.get_mesh().shape, rules)
      model = build(config, rules)
      params = random_params(model, config.compute_dtype)
    records = measure_generation(model, params, rope_theta, list(map(int, contexts)))
    print_records({"generate": records})


def print_records(tables: dict[str, Iterable[dict]]) -> None:
  """Prints all records as one JSON object, or each as a line as soon as it is measured."""
  if _JSON.value:
    tables = {name: list(records) for name, records in tables.items()}
    print(json.dumps({"machine": machine(), **tables}))
    return
  print(machine())
  for name, records in tables.items():
    for record in records:
      texts = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in record.items()
        if value is not None
      )
      print(f"{name}: {', '.join(texts)}", flush=True)


SUBCOMMANDS = {
  "train": train,
  "attention": attention,
  "quantised": quantised,
  "ring": ring,
  "experts": experts,
  "tune": tune,
  "weights": weights,
  "generate": generate,
}


def main(argv: list[str]) -> None:
  if len(argv) != 2 or argv[1] not in SUBCOMMANDS:
    raise UserError(f"name what to measure: one of {', '.join(SUBCOMMANDS)}.")
  SUBCOMMANDS[argv[1]]()


if __name__ == "__main__":
  experiment_flags.run(main, takes_arguments=True)
