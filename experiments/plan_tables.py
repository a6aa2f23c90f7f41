"""The README's tables of plans: `python -m experiments.plan --table=...`."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence

from configs import lwm_text_7b, lwm_vision_7b, models
from lwm.config.experiment import Experiment, Stage
from lwm.config.model import ModelConfig
from lwm.config.validate import check_devices, validate
from lwm.errors import ConfigError
from lwm.plan import StagePlan, Topology, load, longest, plan_stage, report, search
from lwm.plan.candidates import length_text
from lwm.plan.search import Report

# A function that returns an experiment, and the machines to plan it for.
Recipe = tuple[Callable[[], Experiment], tuple[str, ...]]
# Each recipe on LWM's chips, and on half of them.
RECIPES = (
  (lwm_text_7b.get_config, ("v4:8x8x4", "v4:8x4x4")),
  (lwm_vision_7b.get_config, ("v4:8x8x8", "v4:8x8x4")),
)


@dataclasses.dataclass(frozen=True)
class Contest:
  """A model and a machine for which the RingAttention paper (arXiv 2310.01889) gives a context.

  Attributes:
    name: of the model.
    model: its configuration.
    machine: as in --topology.
    paper: the longest context in the paper, in tokens.
  """

  name: str
  model: Callable[[], ModelConfig]
  machine: str
  paper: int


CONTESTS = (
  Contest("7B", models.lwm_7b, "v4:8x8x8", 8 << 20),
  Contest("13B", models.lwm_13b, "v4:8x8x8", 4 << 20),
  Contest("7B", models.lwm_7b, "v5e:16x16", 2 << 20),
  Contest("7B", models.lwm_7b, "a100:1x8", 256 << 10),
  Contest("7B", models.lwm_7b, "a100:4x8", 4 << 20),
)


def recipes(
  report_try: Report, tries: int, as_json: bool, cases: Sequence[Recipe] = RECIPES
) -> Iterator[str]:
  """Lines: every stage with the config's own mesh, or the fastest mesh found if that doesn't fit.

  Args:
    report_try: called after each compilation of a search.
    tries: maximum number of programs to compile per search.
    as_json: yield JSON objects instead of a table.
    cases: functions that return an experiment, each with the machines to plan it for.
  """
  if not as_json:
    yield f"{'config':<14} {report.table_head()}"
  for get_config, machines in cases:
    for machine in machines:
      topology = load(machine)
      experiment = get_config()
      validate(experiment)
      for stage in experiment.stages:
        plan = _own_or_found(experiment, stage, topology, report_try, tries)
        if as_json:
          case = {"config": experiment.name, "stage": stage.name, "machine": machine}
          yield json.dumps({**case, "plan": plan and plan.as_json()})
        else:
          row = report.table_row(plan) if plan else f"{stage.name}: nothing tried fits {machine}"
          yield f"{experiment.name:<14} {row}"


def _own_or_found(
  experiment: Experiment, stage: Stage, topology: Topology, report_try: Report, tries: int
) -> StagePlan | None:
  """The plan with the stage's own mesh if it fits, else the fastest plan found, or None."""
  alone = dataclasses.replace(experiment, stages=[stage])
  try:
    check_devices(alone, len(topology.devices))
    own = plan_stage(alone, stage, topology)[0]
  except ConfigError:
    own = None
  if own is not None and own.memory.fits:
    return own
  return next(search(experiment, stage, topology, report_try, tries), None)


def longest_contexts(
  report_try: Report, tries: int, as_json: bool, cases: Sequence[Contest] = CONTESTS
) -> Iterator[str]:
  """Lines: the longest row for each model and machine, and its ratio to the paper's.

  Args:
    report_try: called after each compilation.
    tries: maximum number of programs to compile per length.
    as_json: yield JSON objects instead of a table.
    cases: models and machines.
  """
  if not as_json:
    yield f"{'model':<6} {'longest':>8} {'paper':>8} {'ratio':>6}  {report.table_head()}"
  for case in cases:
    experiment = dataclasses.replace(lwm_text_7b.get_config(), model=case.model())
    validate(experiment)
    plan = longest(experiment, load(case.machine), report_try, tries)
    length = 0
    if plan:
      assert isinstance(plan.stage, Stage)
      length = plan.stage.sequence_length
    ratio = length / case.paper
    if as_json:
      found = {"model": case.name, "machine": case.machine, "paper": case.paper, "longest": length}
      yield json.dumps({**found, "ratio": ratio, "plan": plan and plan.as_json()})
    else:
      row = report.table_row(plan) if plan else f"nothing tried fits {case.machine}"
      yield (
        f"{case.name:<6} {length_text(length):>8} {length_text(case.paper):>8} {ratio:>5.3g}x"
        f"  {row}"
      )
