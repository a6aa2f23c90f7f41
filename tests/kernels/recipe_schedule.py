"""Prints what a recipe's last stage computes on TPUs while hops of the ring and tokens travel.

  python -m tests.kernels.recipe_schedule CONFIG TOPOLOGY [HLO]

CONFIG is a module of configs, such as experts_fine_16b, and TOPOLOGY a slice as in
`experiments.plan`, such as v5p:4x8x8. The train step is compiled here, without a TPU, which takes
minutes for a large recipe. Each line is a transfer of the compiled program: how often it runs per
step, its array, and how many Pallas kernels and matrix products are scheduled until it is done, by
name. The program itself is written to the file HLO.
"""

import collections
import importlib
import os
import pathlib
import re
import sys

import jax

from lwm.config.validate import validate
from lwm.parallel import xla_flags
from lwm.plan import load, plan_stage
from tests.kernels.hlo_schedule import Schedule


def main(config: str, topology: str, hlo: str | None = None) -> None:
  experiment = importlib.import_module(f"configs.{config}").get_config()
  validate(experiment)
  stage = experiment.stages[-1]
  plan, _, compilation = plan_stage(experiment, stage, load(topology))
  gib = plan.memory.total / 2**30
  print(f"{config}, stage {stage.name}, {topology}: {gib:.1f} GiB per device", flush=True)
  if hlo:
    pathlib.Path(hlo).write_text(compilation.text)
  transfers = Schedule(compilation.text).transfers()
  for transfer in transfers:
    names = collections.Counter(re.sub(r"[.\d]+$", "", name) for name in transfer.kernels)
    beside = ", ".join(f"{count} {name}" for name, count in sorted(names.items())) or "nothing"
    print(f"{transfer.times:>6} x {transfer.array:<28} {beside}")
  overlapping = sum(transfer.times for transfer in transfers if transfer.kernels)
  print(f"{overlapping} of {sum(transfer.times for transfer in transfers)} overlap")


if __name__ == "__main__":
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  xla_flags.apply()
  jax.config.update("jax_platforms", "cpu")
  main(*sys.argv[1:])
