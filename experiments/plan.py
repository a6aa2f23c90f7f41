"""Whether an experiment fits a machine, which you don't need to have, and roughly how fast it is.

    python -m experiments.plan --config=configs/lwm_text_7b.py --topology=v5p:8x8x4 --stage=1m
    python -m experiments.plan --config=configs/lwm_text_7b.py --topology=v5p:8x8x4 --search
    python -m experiments.plan --config=configs/lwm_text_7b.py --topology=v5p:8x8x4 --longest
    python -m experiments.plan --config=configs/experts_fine_16b.py --topology=v5p:4x8x8 --pool
    python -m experiments.plan --table=recipes

Compiles the train step that training would run, ahead of time, on a CPU. libtpu (`pip install
libtpu`) compiles for TPU slices, JAX's CUDA plugin for GPUs (h100:4x8 is four hosts with eight GPUs
each). Settings are flags, as in training: --config.stages[4].mesh.ring=8,
--config.model.remat=attention. `--search` tries meshes, remat policies and offload policies for a
stage. `--longest` tries longer and longer rows, one row per batch over the whole machine. `--pool`
finds several meshes; which of them is the fastest depends on the loads of the experts. All three
print only plans that have been compiled and fit, and report every try on stderr.
"""

import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterable

import jax
from absl import flags

from experiments import flags as experiment_flags, plan_tables
from lwm.config.experiment import AnyExperiment, Experiment
from lwm.config.validate import check_devices, validate
from lwm.errors import UserError
from lwm.parallel import xla_flags
from lwm.plan import StagePlan, Topology, load, longest, plan_stage, pool, report, search
from lwm.plan.candidates import Candidate, candidates
from lwm.train.mesh_choice import PooledMesh, experts_of, ranked, recorded_loads

_CONFIG = experiment_flags.define_config(required=False)
_TOPOLOGY = flags.DEFINE_string("topology", None, "The machine: v5p:8x8x8, v5e:16x16, h100:4x8.")
_STAGE = flags.DEFINE_string("stage", None, "Name or number (from 0) of a stage; default: all.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object per plan and line instead.")
_SEARCH = flags.DEFINE_bool("search", False, "Find the fastest meshes and policies that fit.")
_LONGEST = flags.DEFINE_bool("longest", False, "Find the longest row that fits.")
_POOL = flags.DEFINE_bool(
  "pool", False, "Find the fastest mesh for each number of devices that divide the experts."
)
_LOADS = flags.DEFINE_string(
  "loads", None, "Workdir of a run whose recorded loads of experts choose among --pool's meshes."
)
_TOP = flags.DEFINE_integer("top", 5, "Number of plans that --search prints.", lower_bound=1)
_TRIES = flags.DEFINE_integer(
  "tries",
  16,
  "Maximum number of programs to compile per stage (--search), per length (--longest), or per "
  "number of devices that divide the experts (--pool).",
  lower_bound=1,
)
_TABLE = flags.DEFINE_enum(
  "table",
  None,
  ["recipes", "longest"],
  "LWM's stages on LWM's chips and half of them, or the longest contexts beside RingAttention's.",
)


def main(argv: list[str]) -> None:
  del argv
  if _TABLE.value:
    table = plan_tables.recipes if _TABLE.value == "recipes" else plan_tables.longest_contexts
    for row in table(functools.partial(_tell, tried=[]), _TRIES.value, _JSON.value):
      print(row, flush=True)
    return
  if _CONFIG.value is None or _TOPOLOGY.value is None:
    raise UserError("give --config=FILE and --topology=MACHINE, or --table=recipes or longest.")
  if _SEARCH.value + _LONGEST.value + _POOL.value > 1:
    raise UserError("--search, --longest and --pool exclude each other: give one of them.")
  experiment = _CONFIG.value
  validate(experiment)
  experiment.stages = chosen_stages(experiment, _STAGE.value)
  topology = load(_TOPOLOGY.value)
  if (_SEARCH.value or _LONGEST.value) and not isinstance(experiment, Experiment):
    raise UserError("--search and --longest are for language models: set a VQGAN's mesh by flags.")
  if _LOADS.value and not _POOL.value:
    raise UserError("--loads chooses among the meshes of --pool: give both.")
  if _POOL.value:
    experts_of(experiment)
  if _SEARCH.value or _POOL.value:
    _print_found(experiment, topology)
  elif _LONGEST.value:
    tried: list[StagePlan] = []
    plan = longest(experiment, topology, functools.partial(_tell, tried=tried), _TRIES.value)
    if plan is None:
      raise UserError(report.nothing_fits(topology, "a row", tried, ()))
    _print_rows([plan])
  else:
    check_devices(experiment, len(topology.devices))
    _print_plans(experiment, topology)


def _print_plans(experiment: AnyExperiment, topology: Topology) -> None:
  plans = []
  for stage in experiment.stages:
    plan = plan_stage(experiment, stage, topology)[0]
    plans.append(plan)
    print(
      json.dumps(plan.as_json()) if _JSON.value else report.stage_report(plan) + "\n", flush=True
    )
  if len(plans) > 1 and not _JSON.value:
    print("\n".join([report.table_head(), *map(report.table_row, plans)]))


def _print_found(experiment: Experiment, topology: Topology) -> None:
  """Prints what fits for each stage, then raises a UserError that names stages that don't fit."""
  loads = None
  if _LOADS.value:
    loads = recorded_loads(experiment, pathlib.Path(_LOADS.value))
    if loads is None:
      raise UserError(f"--loads={_LOADS.value} has no loads of experts: name the workdir of a run.")
  missing = []
  for stage in experiment.stages:
    tried: list[StagePlan] = []
    tell = functools.partial(_tell, tried=tried)
    if _POOL.value:
      found = pool(experiment, stage, topology, tell, _TRIES.value)
    else:
      found = itertools.islice(search(experiment, stage, topology, tell, _TRIES.value), _TOP.value)
    plans = _print_rows(found)
    if loads:
      for mesh, imbalance in ranked([PooledMesh.of(plan.as_json()) for plan in plans], loads):
        # Lines of JSON go to a file.
        print(
          f"{stage.name}: {report.milliseconds(mesh.seconds(imbalance))} per step with "
          f"{report.mesh_text(mesh.sizes)}; the largest load of a device is {imbalance:.2f} times "
          "the mean",
          file=sys.stderr if _JSON.value else sys.stdout,
          flush=True,
        )
    if not plans:
      others = candidates(experiment, stage, len(topology.devices), own_policies=_POOL.value)
      missing.append(report.nothing_fits(topology, stage.name, tried, others))
  if missing:
    raise UserError("\n".join(missing))


def _print_rows(plans: Iterable[StagePlan]) -> list[StagePlan]:
  """Prints plans as they arrive, and returns them."""
  printed: list[StagePlan] = []
  for plan in plans:
    if _JSON.value:
      print(json.dumps(plan.as_json()), flush=True)
    else:
      head = "" if printed else report.table_head() + "\n"
      print(head + report.table_row(plan), flush=True)
    printed.append(plan)
  return printed


def _tell(
  candidate: Candidate, plan: StagePlan | None, reason: str, tried: list[StagePlan]
) -> None:
  print(report.try_line(candidate, plan, reason), file=sys.stderr, flush=True)
  if plan is not None:
    tried.append(plan)


def chosen_stages(experiment: AnyExperiment, choice: str | None) -> list:
  """The stage with this name or number, or all stages if `choice` is None."""
  if choice is None:
    return experiment.stages
  names = [stage.name for stage in experiment.stages]
  if choice in names:
    return [experiment.stages[names.index(choice)]]
  if choice.isdigit() and int(choice) < len(names):
    return [experiment.stages[int(choice)]]
  raise UserError(
    f"--stage={choice}: the experiment's stages are {', '.join(names)}; give a name, or a number "
    "from 0."
  )


if __name__ == "__main__":
  # libtpu logs a lot when it starts.
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  # Without this, XLA's warnings about GPU programs bury the lines of --search. `import jax` has set
  # level 1, which still shows warnings; the GPU compiler reads the level later, when it is loaded.
  if os.environ["TF_CPP_MIN_LOG_LEVEL"] == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
  xla_flags.apply()
  # Only compilers are needed: a TPU or GPU of this machine stays free for others.
  jax.config.update("jax_platforms", "cpu")
  experiment_flags.run(main)
