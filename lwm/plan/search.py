"""The fastest ways to run a stage on a machine, and the longest context that a machine takes.

What comes out has been compiled and fits. Candidates are left out by counting (`lwm.plan.bound`),
put in order by the roofline, and compiled one after the other; what those took beyond the count is
then expected of the others with their remat policy, groups of heads, and a ring or none.
"""

from collections.abc import Callable, Iterator

from lwm.config.experiment import Experiment, Stage
from lwm.errors import UserError
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import AXES
from lwm.plan.candidates import Candidate, candidates, single_row
from lwm.plan.plan import StagePlan, plan_stage
from lwm.plan.roofline import estimate
from lwm.plan.topology import Topology

# Of the mesh; one row of a batch cannot be divided over the others.
_SEQUENCE_AXES = ("ring", "ulysses", "tensor")
# Is told of every candidate what became of it, None if XLA refused it: (candidate, plan, reason).
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
    stage: its mesh does not matter.
    topology: all of whose devices to use.
    report: progress.
    tries: programs to compile at most.
    axes: of the mesh to try.
  """
  fitting = [
    candidate
    for candidate in candidates(experiment, stage, len(topology.devices), axes)
    if candidate.may_fit(topology.chip)
  ]
  # Where the roofline sees no difference, the leanest.
  fitting.sort(key=lambda c: (_step_seconds(c, topology), c.least_memory))
  # The least of compiled over counted bytes: of LWM's recipes 1.3 to 1.7 without a ring, and 1.5 to
  # 2.1 with one.
  beyond = {}
  for candidate in fitting:
    model = candidate.experiment.model
    policy = model.remat, model.head_groups, candidate.stage.mesh.ring > 1
    if candidate.least_memory * beyond.get(policy, 1.0) > topology.chip.memory:
      continue
    if tries == 0:
      return
    tries -= 1
    plan = _compile(candidate, topology, report)
    if plan is None:
      continue
    ratio = plan.memory.total / candidate.least_memory
    beyond[policy] = min(ratio, beyond.get(policy, ratio))
    if plan.memory.fits:
      yield plan


def longest(
  experiment: Experiment, topology: Topology, report: Report, tries: int
) -> StagePlan | None:
  """The longest row, a power of two of tokens, that all devices together can train on.

  Starts from what counting allows. Of each length the `tries` leanest candidates are compiled; at
  the longest that fits, the fastest.

  Args:
    experiment: validated; its first stage gives what is not length, batch and mesh.
    topology: all of whose devices to use.
    report: progress.
    tries: programs to compile of each length at most.

  Returns:
    The fastest plan found for the longest row, None if no row fits.
  """

  chip = topology.chip

  def leanest(length: int) -> list[Candidate]:
    stage = single_row(experiment, length)
    found = candidates(experiment, stage, len(topology.devices), _SEQUENCE_AXES)
    # What is kept in the host's memory is known; the device's is left to the compiler.
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

  # Two chunks a device: a power of two of tokens.
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
  fastest = next(search(experiment, stage, topology, report, tries, _SEQUENCE_AXES), plan)
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
