"""The meshes and policies that a stage could run with on a machine."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator

from lwm.config.experiment import Experiment, Stage
from lwm.config.model import REMAT_POLICIES
from lwm.config.validate import check_devices, check_model_fits_mesh, validate
from lwm.cost.chips import Chip
from lwm.errors import ConfigError
from lwm.parallel.sharding import AXES, MeshConfig, ShardingRules
from lwm.plan.bound import least_memory
from lwm.plan.traffic import host_memory

# Numbers of head groups to try. Only 1 where tokens are gathered over `tensor`: each group would
# gather them again.
_HEAD_GROUPS: tuple[int, ...] = (1, 4)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to run a stage.

  Attributes:
    experiment: has one stage, whose mesh has a size for every axis.
    least_memory: bytes per device at least (lwm/plan/bound.py).
    host_memory: bytes of the host's memory per device.
  """

  experiment: Experiment
  least_memory: float
  host_memory: float

  @property
  def stage(self) -> Stage:
    return self.experiment.stages[0]

  def shortage(self, chip: Chip) -> float:
    """Bytes that are missing at least, in the device's memory or in the host's."""
    return max(self.least_memory - chip.memory, self.host_memory - chip.host_memory)

  def may_fit(self, chip: Chip) -> bool:
    """Whether the counted bytes fit; the compiled program may still not fit."""
    return self.shortage(chip) <= 0


def candidates(
  experiment: Experiment,
  stage: Stage,
  num_devices: int,
  axes: tuple[str, ...] = AXES,
  own_policies: bool = False,
) -> Iterator[Candidate]:
  """All meshes that the stage and the model allow, with each remat and offload policy.

  The policies include head groups that attend in turn: they save memory and compute projections
  again.

  Args:
    experiment: its model and optimizer are used. The moments' dtype is never changed, because it
      changes the results of training.
    stage: its lengths, batch and layout are used.
    num_devices: number of devices; every mesh uses all of them.
    axes: mesh axes to try; the others have one device.
    own_policies: try only the policies of the experiment.
  """
  shapes = _factorisations(num_devices, len(axes))
  groups, policies = _HEAD_GROUPS, [*itertools.product(REMAT_POLICIES, (False, True))]
  if own_policies:
    groups = (experiment.model.head_groups,)
    policies = [(experiment.model.remat, experiment.optimizer.offload)]
  for shape, head_groups in itertools.product(shapes, groups):
    sizes = {**dict.fromkeys(AXES, 1), **dict(zip(axes, shape))}
    if head_groups > 1 and sizes[ShardingRules.tensor] > 1:
      continue
    if experiment.model.experts is None and sizes[ShardingRules.expert] > 1:
      continue
    mesh = MeshConfig(**sizes)
    trial = dataclasses.replace(
      experiment,
      model=dataclasses.replace(experiment.model, head_groups=head_groups),
      stages=[dataclasses.replace(stage, mesh=mesh)],
    )
    try:
      validate(trial)
      check_devices(trial, num_devices)
      check_model_fits_mesh(trial.model, sizes)
    except ConfigError:
      continue
    for remat, offload in policies:
      choice = dataclasses.replace(
        trial,
        model=dataclasses.replace(trial.model, remat=remat),
        optimizer=dataclasses.replace(trial.optimizer, offload=offload),
      )
      arguments = choice, choice.stages[0], sizes
      yield Candidate(choice, least_memory(*arguments), sum(host_memory(*arguments)))


def single_row(experiment: Experiment, length: int) -> Stage:
  """The first stage with one row of `length` tokens per batch."""
  return dataclasses.replace(
    copy.deepcopy(experiment.stages[0]),
    name=length_text(length),
    sequence_length=length,
    tokens_per_batch=length,
    accumulation_steps=1,
  )


def length_text(length: int) -> str:
  """A number of tokens in the usual units: 32K, 8M."""
  for unit, scale in (("M", 2**20), ("K", 2**10)):
    if length >= scale:
      return f"{length / scale:g}{unit}"
  return str(length)


def _factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
  """All ordered tuples of `parts` factors whose product is `number`."""
  if parts == 1:
    yield (number,)
    return
  for first in range(1, number + 1):
    if number % first == 0:
      for rest in _factorisations(number // first, parts - 1):
        yield (first, *rest)
