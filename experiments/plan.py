"""Whether an experiment fits a machine that need not be there, and roughly how fast it would be.

    python -m experiments.plan --config=configs/lwm_text_7b.py --topology=v5p:8x8x4 --stage=1m
    python -m experiments.plan --config=configs/lwm_text_7b.py --topology=v5p:8x8x4 --search
    python -m experiments.plan --config=configs/lwm_text_7b.py --topology=v5p:8x8x4 --longest
    python -m experiments.plan --table=recipes

Compiles the train step that training would run, ahead of time, on a CPU: TPU slices by
`pip install libtpu`, GPUs (h100:4x8, four hosts of eight) by JAX's CUDA plugin. Settings are flags,
as in training: --config.stages[4].mesh.ring=8, --config.model.remat=attention. `--search` tries
meshes, remat and offload policies of a stage, `--longest` rows of one batch over the whole machine;
both print only what has been compiled and fits, and on stderr what they try.
"""

import functools
import itertools
import json
import os
import sys
from collections.abc import Iterable

import jax
from absl import flags

from experiments import flags as experiment_flags, plan_tables
from lwm.config.experiment import Experiment, Stage
from lwm.config.validate import check_devices, validate
from lwm.errors import UserError
from lwm.parallel import xla_flags
from lwm.plan import StagePlan, Topology, load, longest, plan_stage, report, search
from lwm.plan.candidates import Candidate, candidates

_CONFIG = experiment_flags.define_config(required=False)
_TOPOLOGY = flags.DEFINE_string("topology", None, "The machine: v5p:8x8x8, v5e:16x16, h100:4x8.")
_STAGE = flags.DEFINE_string("stage", None, "Name or number (from 0) of a stage; all unless given.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object a line for each plan instead.")
_SEARCH = flags.DEFINE_bool("search", False, "Find the fastest meshes and policies that fit.")
_LONGEST = flags.DEFINE_bool("longest", False, "Find the longest row that fits.")
_TOP = flags.DEFINE_integer("top", 5, "Plans that --search prints.", lower_bound=1)
_TRIES = flags.DEFINE_integer(
  "tries",
  16,
  "Programs that --search compiles of a stage, --longest of a length, at most.",
  lower_bound=1,
)
_TABLE = flags.DEFINE_enum(
  "table",
  None,
  ["recipes", "longest"],
  "LWM's stages on its chips and on half of them, or longest contexts against RingAttention's.",
)


def main(argv: list[str]) -> None:
  del argv
  if _TABLE.value:
    table = plan_tables.recipes if _TABLE.value == "recipes" else plan_tables.longest_contexts
    for row in table(functools.partial(_tell, tried=[]), _TRIES.value, _JSON.value):
      print(row, flush=True)
    return
  if _CONFIG.value is None or _TOPOLOGY.value is None:
    raise UserError("say --config=FILE and --topology=MACHINE, or --table=recipes or longest.")
  if _SEARCH.value and _LONGEST.value:
    raise UserError("--search and --longest are two questions: ask one.")
  experiment = _CONFIG.value
  validate(experiment)
  experiment.stages = chosen_stages(experiment, _STAGE.value)
  topology = load(_TOPOLOGY.value)
  if _SEARCH.value:
    _print_found(experiment, topology)
  elif _LONGEST.value:
    tried = []
    plan = longest(experiment, topology, functools.partial(_tell, tried=tried), _TRIES.value)
    if plan is None:
      raise UserError(report.nothing_fits(topology, "a row", tried, ()))
    _print_rows([plan])
  else:
    check_devices(experiment, len(topology.devices))
    _print_plans(experiment, topology)


def _print_plans(experiment: Experiment, topology: Topology) -> None:
  plans = []
  for stage in experiment.stages:
    plan = plan_stage(experiment, stage, topology)[0]
    plans.append(plan)
    print(
      json.dumps(plan.as_json()) if _JSON.value else report.stage_report(plan) + "\n", flush=True
    )
  if len(plans) > 1 and not _JSON.value:
    print(report.table(plans))


def _print_found(experiment: Experiment, topology: Topology) -> None:
  """What fits of every stage; raises a UserError in the end if of some nothing does."""
  missing = []
  for stage in experiment.stages:
    tried = []
    tell = functools.partial(_tell, tried=tried)
    found = search(experiment, stage, topology, tell, _TRIES.value)
    if not _print_rows(itertools.islice(found, _TOP.value)):
      others = candidates(experiment, stage, len(topology.devices))
      missing.append(report.nothing_fits(topology, stage.name, tried, others))
  if missing:
    raise UserError("\n".join(missing))


def _print_rows(plans: Iterable[StagePlan]) -> int:
  """As they come; all of them fit. Returns how many they are."""
  count = 0
  for count, plan in enumerate(plans, 1):
    if _JSON.value:
      print(json.dumps(plan.as_json()), flush=True)
    else:
      head = report.table_head() + "\n" if count == 1 else ""
      print(head + report.table_row(plan), flush=True)
  return count


def _tell(
  candidate: Candidate, plan: StagePlan | None, reason: str, tried: list[StagePlan]
) -> None:
  print(report.try_line(candidate, plan, reason), file=sys.stderr, flush=True)
  if plan is not None:
    tried.append(plan)


def chosen_stages(experiment: Experiment, choice: str | None) -> list[Stage]:
  """The stage of that name or number, or all of them."""
  if choice is None:
    return experiment.stages
  names = [stage.name for stage in experiment.stages]
  if choice in names:
    return [experiment.stages[names.index(choice)]]
  if choice.isdigit() and int(choice) < len(names):
    return [experiment.stages[int(choice)]]
  raise UserError(f"--stage={choice}: the experiment's stages are {', '.join(names)}, from 0.")


if __name__ == "__main__":
  # Compilers only: a TPU or GPU that is here stays free for others. libtpu's start is noisy.
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  xla_flags.apply()
  jax.config.update("jax_platforms", "cpu")
  experiment_flags.run(main)
