"""The choice among a pool of meshes (`lwm.plan.search.pool`) by the loads that a run has recorded.

All devices wait for the one whose experts have the most tokens. Its load depends on the number of
devices that divide the experts, and on the placement. Both are replayed here from the recorded
loads, so a run on any mesh can tell how fast it would be on another one.

T steps, L layers of experts, E experts, R = T x L, P slots, n devices that divide the experts.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.experts.slots import at_home
from lwm.config.experiment import AnyExperiment, Experiment
from lwm.config.model import EXPERTS, ExpertsConfig
from lwm.errors import UserError
from lwm.model.balance import mean_after
from lwm.model.placement import choose_slots, device_loads
from lwm.parallel.sharding import MeshConfig, ShardingRules
from lwm.plan.report import mesh_text
from lwm.report.metrics import FILE_NAME, read_metrics

# Only the loads of the newest steps are replayed, this many of them.
STEPS = 32


class PooledMesh(NamedTuple):
  """A mesh of a pool.

  Attributes:
    stage: name of the stage that it is for.
    sizes: devices along each mesh axis.
    step_seconds: estimate for equal loads.
    expert_seconds: see `lwm.plan.roofline.Roofline`.
  """

  stage: str
  sizes: dict[str, int]
  step_seconds: float
  expert_seconds: float

  @classmethod
  def of(cls, plan: Mapping[str, Any]) -> "PooledMesh":
    """The mesh of a plan, as `StagePlan.as_json` gives it."""
    roofline = plan["roofline"]
    return cls(plan["stage"], plan["mesh"], roofline["step_seconds"], roofline["expert_seconds"])

  def seconds(self, imbalance: float) -> float:
    """Estimate of a step in which the largest load of a device is `imbalance` times the mean."""
    return self.step_seconds + (imbalance - 1) * self.expert_seconds


class RecordedLoads:
  """The loads of experts in the newest steps of a run."""

  def __init__(self, experts: ExpertsConfig, load_TxLxE: np.ndarray):
    """
    Args:
      experts: its placement policy is replayed.
      load_TxLxE: choices of each expert.
    """
    self._experts = experts
    # The mean of earlier loads places the experts of each step, so the first step is not replayed.
    loads = jnp.asarray(load_TxLxE, jnp.float32)
    mean_LxE, means = jnp.zeros(loads.shape[1:]), []
    for load_LxE in loads[:-1]:
      mean_LxE = mean_after(mean_LxE, load_LxE, experts.load_decay)
      means.append(mean_LxE)
    self._mean_RxE = jnp.concatenate(means)
    load_RxE = jnp.concatenate(loads[1:])
    self._load_RxE = load_RxE / jnp.maximum(jnp.mean(load_RxE, axis=1, keepdims=True), 1e-9)

  def imbalance(self, sizes: Mapping[str, int]) -> float:
    """The largest load of a device divided by the mean load, averaged over steps and layers.

    If several groups of devices exchange tokens, each group is assumed to have the same loads.

    Args:
      sizes: devices along each mesh axis.
    """
    n = math.prod(sizes[axis] for axis in ShardingRules().experts)
    E = self._load_RxE.shape[1]
    slots, axis = at_home(E), None
    if self._experts.placement != "home":
      slots, axis = choose_slots(self._experts, self._mean_RxE, n), 0
    loads = jax.vmap(lambda load_E, slots: device_loads(load_E, slots, n), (0, axis))
    load_Rxn = loads(self._load_RxE, slots)
    return float(jnp.mean(jnp.max(load_Rxn, axis=1))) * n / E


def recorded_loads(experiment: Experiment, workdir: pathlib.Path) -> RecordedLoads | None:
  """The newest loads of a run; None before its second step.

  Raises:
    UserError: the loads belong to a model with other layers or experts.
  """
  experts, path = experts_of(experiment), workdir / FILE_NAME
  records = [record for record in read_metrics(path) if "expert_load" in record]
  if len(records) < 2:
    return None
  load_TxLxE = np.sum([record["expert_load"] for record in records[-STEPS - 1 :]], axis=2)
  stretches = experiment.model.resolved_stretches
  layers = sum(stretch.num_layers for stretch in stretches if stretch.kind == EXPERTS)
  if load_TxLxE.shape[1:] != (layers, experts.num_experts):
    raise UserError(
      f"{path} has the loads of {load_TxLxE.shape[1]} layers of {load_TxLxE.shape[2]} experts, but "
      f"this model has {layers} layers of {experts.num_experts}: name a run of this model."
    )
  return RecordedLoads(experts, load_TxLxE)


def experts_of(experiment: AnyExperiment) -> ExpertsConfig:
  """The experts of a model. Raises a UserError if it has none."""
  if not isinstance(experiment, Experiment) or experiment.model.experts is None:
    raise UserError("--pool is for models with experts: set the meshes of other models by flags.")
  return experiment.model.experts


def ranked(
  meshes: Iterable[PooledMesh], loads: RecordedLoads | None
) -> list[tuple[PooledMesh, float]]:
  """The meshes, the fastest first, each with the largest load of a device divided by the mean.

  Args:
    meshes: of one stage.
    loads: None: all loads are equal.
  """
  pairs = [(mesh, loads.imbalance(mesh.sizes) if loads else 1.0) for mesh in meshes]
  return sorted(pairs, key=lambda pair: pair[0].seconds(pair[1]))


def with_chosen_meshes(
  experiment: AnyExperiment, pool: pathlib.Path, workdir: pathlib.Path, num_devices: int
) -> tuple[Experiment, list[str]]:
  """The experiment with the mesh of a pool in each stage that is fastest for a run's loads.

  All processes of a run choose the same meshes, because they read the same files.

  Args:
    experiment: its stages keep their meshes if the pool has none for them.
    pool: a file of plans, one per line, that `experiments.plan --pool --json` has printed.
    workdir: of the run, whose newest loads decide. Before there are any, all loads are equal.
    num_devices: meshes for other numbers of devices are ignored.

  Returns:
    The experiment, and a sentence for each stage with a mesh from the pool.

  Raises:
    UserError: the model has no experts, or the file is not a pool.
  """
  experts_of(experiment)
  assert isinstance(experiment, Experiment)
  try:
    meshes = [PooledMesh.of(plan) for plan in read_metrics(pool)]
  except (KeyError, TypeError):
    meshes = []
  if not meshes:
    raise UserError(
      f"--pool={pool} has no plans: write them with `python -m experiments.plan --pool --json`."
    )
  loads = recorded_loads(experiment, workdir)
  stages, notes = [], []
  for stage in experiment.stages:
    choices = [
      mesh
      for mesh in meshes
      if mesh.stage == stage.name and math.prod(mesh.sizes.values()) == num_devices
    ]
    if choices:
      mesh, imbalance = ranked(choices, loads)[0]
      stage = dataclasses.replace(stage, mesh=MeshConfig(**mesh.sizes))
      reason = "no loads are recorded yet"
      if loads:
        reason = f"the largest load of a device is {imbalance:.2f} times the mean"
      notes.append(
        f"{stage.name}: {mesh_text(mesh.sizes)} is the fastest of {len(choices)} meshes in {pool} "
        f"({reason})"
      )
    stages.append(stage)
  return dataclasses.replace(experiment, stages=stages), notes
