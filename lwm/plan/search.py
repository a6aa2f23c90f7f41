"""The fastest ways to run a stage on a machine, and the longest context that fits a machine.

For a model with experts, also a pool of meshes, among which lwm/train/mesh_choice.py chooses.

All results have been compiled and fit. Candidates that exceed the lower bound (lwm/plan/bound.py)
are excluded; the others are ordered by the roofline and compiled in turn. The ratio of compiled to
counted memory is then expected of all candidates that agree in remat policy, in the number of head
groups, and in whether they have a ring.
"""

import collections
import math
from collections.abc import Callable, Iterable, Iterator

from lwm.config.experiment import Experiment, Stage
from lwm.cost.layer import Division
from lwm.errors import UserError
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import AXES, ShardingRules
from lwm.plan.candidates import Candidate, candidates, single_row
from lwm.plan.plan import StagePlan, plan_stage
from lwm.plan.roofline import estimate
from lwm.plan.topology import Topology

_RULES = ShardingRules()
# Called for every candidate: (candidate, its plan or None if XLA refused it, XLA's reason).
Report = Callable[[Candidate, StagePlan | None, str], None]


def search(
  experiment: Experiment,
  stage: Stage,
  topology: Topology,
  report: Report,
  tries: int,
  axes: tuple[str, ...] = AXES,
) -> Iterator[StagePlan]:
  """The plans that fit, fastest first by the roofline; ends after `tries` compilations.

  Args:
    experiment: validated.
    stage: its mesh is ignored.
    topology: the machine, all of whose devices are used.
    report: called after each compilation.
    tries: maximum number of programs to compile.
    axes: mesh axes to try.
  """
  found = candidates(experiment, stage, len(topology.devices), axes)
  return _fastest_first(found, topology, report, tries)


def pool(
  experiment: Experiment, stage: Stage, topology: Topology, report: Report, tries: int
) -> Iterator[StagePlan]:
  """Meshes of which each may be the fastest, depending on the loads of experts.

  SmartMoE (USENIX ATC 2023) also builds a pool offline and chooses at run time. Here the loads
  matter only through the number of devices that divide the experts: the fewer, the closer is each
  device's load to the mean, and the more weights are gathered. So for each number, the fastest mesh
  that fits is kept, unless a mesh with a smaller number is as fast when all loads are equal.

  Args:
    experiment: validated; its remat policy, head groups and offloading are kept.
    stage: its mesh is ignored.
    topology: the machine, all of whose devices are used.
    report: called after each compilation.
    tries: maximum number of programs to compile for each number of devices.

  Yields:
    Plans that fit, each faster than the one before and with more devices that divide the experts.
  """
  groups = collections.defaultdict(list)
  for candidate in candidates(experiment, stage, len(topology.devices), own_policies=True):
    sizes = candidate.stage.mesh.axis_sizes()
    groups[Division.of(candidate.stage, sizes).experts].append(candidate)
  fastest = math.inf
  for _, group in sorted(groups.items()):
    plan = next(_fastest_first(group, topology, report, tries, fastest), None)
    if plan is not None:
      fastest = plan.roofline.step_seconds
      yield plan


def _fastest_first(
  found: Iterable[Candidate],
  topology: Topology,
  report: Report,
  tries: int,
  limit: float = math.inf,
) -> Iterator[StagePlan]:
  """The plans that fit and take fewer than `limit` seconds per step; see `search`."""
  fitting = [
    (_step_seconds(candidate, topology), candidate)
    for candidate in found
    if candidate.may_fit(topology.chip)
  ]
  # Candidates with equal estimates: the one with the least memory first.
  fitting.sort(key=lambda timed: (timed[0], timed[1].least_memory))
  # The least ratio of compiled to counted bytes so far. For LWM's recipes it is 1.3 to 1.7 without
  # a ring, and 1.5 to 2.1 with one.
  ratios: dict[tuple[str, int, bool], float] = {}
  for seconds, candidate in fitting:
    if seconds >= limit:
      return
    model, sizes = candidate.experiment.model, candidate.stage.mesh.axis_sizes()
    policy = model.remat, model.head_groups, sizes[_RULES.ring] > 1
    if candidate.least_memory * ratios.get(policy, 1.0) > topology.chip.memory:
      continue
    if tries == 0:
      return
    tries -= 1
    plan = _compile(candidate, topology, report)
    if plan is None:
      continue
    ratio = plan.memory.total / candidate.least_memory
    ratios[policy] = min(ratio, ratios.get(policy, ratio))
    if plan.memory.fits:
      yield plan


def longest(
  experiment: Experiment, topology: Topology, report: Report, tries: int
) -> StagePlan | None:
  """The longest row, a power of two of tokens, that all devices together can train on.

  Starts from the longest row that the lower bound allows. For each length, the `tries` candidates
  with the least memory are compiled; for the longest row that fits, then the fastest candidates.

  Args:
    experiment: validated; its first stage gives all settings except length, batch and mesh.
    topology: the machine, all of whose devices are used.
    report: called after each compilation.
    tries: maximum number of programs to compile per length.

  Returns:
    The fastest plan found for the longest row, or None if no row fits.
  """
  chip = topology.chip
  # The axes over which one row can be divided.
  axes = _RULES.residual
  assert axes is not None

  def leanest(length: int) -> list[Candidate]:
    stage = single_row(experiment, length)
    found = candidates(experiment, stage, len(topology.devices), axes)
    # The use of the host's memory is known exactly; the compiler decides about the device's memory.
    held = [candidate for candidate in found if candidate.host_memory <= chip.host_memory]
    return sorted(held, key=lambda candidate: candidate.least_memory)

  def fits(length: int) -> StagePlan | None:
    for candidate in leanest(length)[:tries]:
      plan = _compile(candidate, topology, report)
      if plan is not None and plan.memory.fits:
        return plan
    return None

  def counts(length: int) -> bool:
    return any(candidate.may_fit(chip) for candidate in leanest(length)[:1])

  # Two chunks per device, rounded up to a power of two.
  length = shortest = 1 << (2 * len(topology.devices) - 1).bit_length()
  while counts(2 * length):
    length *= 2
  plan = fits(length)
  while plan is not None and (longer := fits(2 * length)):
    length, plan = 2 * length, longer
  while plan is None and length > shortest:
    length //= 2
    plan = fits(length)
  if plan is None:
    return None
  stage = single_row(experiment, length)
  fastest = next(search(experiment, stage, topology, report, tries, axes), plan)
  return min(fastest, plan, key=lambda plan: plan.roofline.step_seconds)


def _step_seconds(candidate: Candidate, topology: Topology) -> float:
  mesh = make_mesh(candidate.stage.mesh, topology.devices)
  return estimate(candidate.experiment, candidate.stage, mesh, topology).step_seconds


def _compile(candidate: Candidate, topology: Topology, report: Report) -> StagePlan | None:
  try:
    plan, reason = plan_stage(candidate.experiment, candidate.stage, topology)[0], ""
  except UserError as error:
    plan, reason = None, str(error)
  report(candidate, plan, reason)
  return plan
