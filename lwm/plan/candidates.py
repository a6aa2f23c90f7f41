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
from lwm.parallel.sharding import AXES, MeshConfig
from lwm.plan.bound import least_memory
from lwm.plan.traffic import host_memory

# Of heads, one after the other. Not over `tensor`: each group would gather the tokens anew.
_HEAD_GROUPS = (1, 4)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to run a stage.

  Attributes:
    experiment: with one stage, whose mesh has a size for every axis.
    least_memory: bytes of one device: `lwm.plan.bound`.
    host_memory: bytes of the host's memory for one device.
  """

  experiment: Experiment
  least_memory: float
  host_memory: float

  @property
  def stage(self) -> Stage:
    return self.experiment.stages[0]

  def shortage(self, chip: Chip) -> float:
    """Bytes that are missing at least, of the device's memory or of the host's."""
    return max(self.least_memory - chip.memory, self.host_memory - chip.host_memory)

  def may_fit(self, chip: Chip) -> bool:
    """Whether counting allows it."""
    return self.shortage(chip) <= 0


def candidates(
  experiment: Experiment, stage: Stage, num_devices: int, axes: tuple[str, ...] = AXES
) -> Iterator[Candidate]:
  """All meshes that the stage and the model allow, with each remat and offload policy.

  Groups of heads that attend in turn, which save memory and compute projections again, are among
  the policies.

  Args:
    experiment: whose model and optimizer to take. The moments' dtype stays: it changes the numbers.
    stage: whose lengths, batch and layout to take.
    num_devices: all of which every mesh uses.
    axes: of the mesh; the others have one device.
  """
  shapes = _factorisations(num_devices, len(axes))
  for sizes, head_groups in itertools.product(shapes, _HEAD_GROUPS):
    mesh = MeshConfig(**{**dict.fromkeys(AXES, 1), **dict(zip(axes, sizes))})
    if head_groups > 1 and mesh.tensor > 1:
      continue
    trial = dataclasses.replace(
      experiment,
      model=dataclasses.replace(experiment.model, head_groups=head_groups),
      stages=[dataclasses.replace(stage, mesh=mesh)],
    )
    try:
      validate(trial)
      check_devices(trial, num_devices)
      check_model_fits_mesh(trial.model, mesh.axis_sizes())
    except ConfigError:
      continue
    for remat in REMAT_POLICIES:
      for offload in (False, True):
        choice = dataclasses.replace(
          trial,
          model=dataclasses.replace(trial.model, remat=remat),
          optimizer=dataclasses.replace(trial.optimizer, offload=offload),
        )
        arguments = choice, choice.stages[0], mesh.axis_sizes()
        yield Candidate(choice, least_memory(*arguments), sum(host_memory(*arguments)))


def single_row(experiment: Experiment, length: int) -> Stage:
  """The first stage with one row of `length` tokens a batch."""
  return dataclasses.replace(
    copy.deepcopy(experiment.stages[0]),
    name=length_text(length),
    sequence_length=length,
    tokens_per_batch=length,
    accumulation_steps=1,
  )


def length_text(length: int) -> str:
  """Tokens in the units that people use: 32K, 8M."""
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
