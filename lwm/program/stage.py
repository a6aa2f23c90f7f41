"""A stage as programs: its mesh, its shardings and its compiled steps.

Nothing here touches data or files. The devices may belong to an ahead-of-time topology, so that a
planner compiles exactly what a run would.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kernels.ring import Layout
from lwm import model as model_lib
from lwm.config.batch import FIELDS
from lwm.config.experiment import (
  AnyExperiment,
  AnyStage,
  Experiment,
  Stage,
  VQGANExperiment,
  VQGANStage,
)
from lwm.config.model import ModelConfig
from lwm.config.validate import check_model_fits_mesh
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import ShardingRules
from lwm.program import optimizer as optimizer_lib, state as state_lib, step as step_lib
from lwm.program.frame_objective import FRAMES, FrameObjective, logical_axes
from lwm.program.objective import Objective
from lwm.program.state import TrainState
from lwm.program.trainable import Trainable, matching, num_elements, trainable
from lwm.vision.objective import VQGANObjective

_RULES = ShardingRules()


@dataclasses.dataclass(frozen=True)
class StageProgram:
  """What a stage runs, under `jax.set_mesh(program.mesh)`.

  `train_step(state, batch, loss_limit) -> (state, metrics)`, which donates its state, and
  `evaluation_step(params, batch) -> sums` are jitted; see lwm/program/step.py and the objective's
  `evaluate`. `state` and `batch` are ShapeDtypeStructs with shardings.
  """

  objective: Any  # See `lwm.program.step.Objective`.
  mesh: Mesh
  state: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]
  optimizer: Any
  train_step: Any
  evaluation_step: Any

  @property
  def trainable(self) -> Trainable:
    return self.objective.trainable

  def initial_params(self, seed: int) -> Any:
    """Random parameters, each shard made on its own device."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state.params)
    return jax.jit(self.objective.init, out_shardings=shardings)(jax.random.key(seed))

  def place_params(self, params: Any) -> Any:
    """Moves the parameters of another stage to this mesh; donates the given ones."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state.params)
    return jax.device_put(params, shardings, donate=True)

  def fresh_state(self, params: Any) -> TrainState:
    """The state at the start of the stage."""
    return state_lib.fresh_state(params, self.optimizer, self.trainable, self.state)

  def trained_text(self) -> str:
    """A phrase that says how many parameters are trained; empty if all are."""
    trained, frozen = (num_elements(part) for part in self.trainable.split(self.state.params))
    total = trained + frozen
    return f"trains {trained:,} of {total:,} parameters ({trained / total:.2%})" if frozen else ""

  @functools.cached_property
  def traced(self) -> jax.stages.Traced:
    """The train step, traced for the stage's batches. Ask for it under the mesh."""
    return self.train_step.trace(self.state, self.batch, jax.ShapeDtypeStruct((), jnp.float32))


@dataclasses.dataclass(frozen=True)
class _Parts:
  """What differs between the programs of language models and of VQGANs.

  Attributes:
    objective: what is minimised.
    params: ShapeDtypeStructs without shardings.
    logical_axes: a tuple of logical axis names per parameter.
    batch: ShapeDtypeStructs with shardings.
  """

  objective: Any
  params: Any
  logical_axes: Any
  batch: dict[str, jax.ShapeDtypeStruct]


def build_program(
  experiment: AnyExperiment, stage: AnyStage, devices: Sequence[jax.Device] | None = None
) -> StageProgram:
  """The programs of `stage`; nothing is compiled yet.

  Args:
    experiment: validated.
    stage: one of its stages.
    devices: default: all devices of the run.

  Raises:
    ConfigError: the mesh does not use the devices, the model does not divide over the mesh, or one
      of its stretches names a kind of layers that does not exist.
  """
  mesh = make_mesh(stage.mesh, devices)
  if isinstance(experiment, VQGANExperiment):
    assert isinstance(stage, VQGANStage)
    parts = _vqgan_parts(experiment, stage, mesh)
  else:
    assert isinstance(stage, Stage)
    parts = _language_parts(experiment, stage, mesh)
  abstract_params = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    parts.params,
    _RULES.tree_shardings(parts.logical_axes, mesh),
  )
  trained = parts.objective.trainable
  optimizer = optimizer_lib.adamw(experiment.optimizer, stage, trained.split(parts.logical_axes)[0])
  replicated = NamedSharding(mesh, _RULES.spec())
  state = state_lib.abstract_state(
    abstract_params, optimizer, trained, mesh, experiment.optimizer.offload
  )
  train_step = jax.jit(
    functools.partial(
      step_lib.train_step,
      objective=parts.objective,
      optimizer=optimizer,
      learning_rate=optimizer_lib.learning_rate(experiment.optimizer, stage),
    ),
    out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated),
    donate_argnums=0,
  )
  return StageProgram(
    objective=parts.objective,
    mesh=mesh,
    state=state,
    batch=parts.batch,
    optimizer=optimizer,
    train_step=train_step,
    evaluation_step=jax.jit(parts.objective.evaluate, out_shardings=replicated),
  )


def _language_parts(experiment: Experiment, stage: Stage, mesh: Mesh) -> _Parts:
  config = _with_padded_tables(experiment, stage, mesh.size, _RULES)
  check_model_fits_mesh(config, mesh.shape, _RULES)
  model = model_lib.build(config, _RULES)
  params = model.abstract()
  shape = stage.rows_per_batch, stage.sequence_length
  sharding = NamedSharding(mesh, _RULES.spec("batch", "sequence"))
  objective = Objective(
    model,
    experiment.loss,
    stage.rope_theta,
    Layout(stage.layout, mesh.shape[_RULES.ring]),
    stage.accumulation_steps,
    trainable(experiment, stage, params),
  )
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in FIELDS.items()
  }
  return _Parts(objective, params, model.logical_axes, batch)


def _vqgan_parts(experiment: VQGANExperiment, stage: VQGANStage, mesh: Mesh) -> _Parts:
  vqgan = VQGANObjective(experiment.vqgan, experiment.losses)
  params = vqgan.abstract()
  before = itertools.takewhile(lambda other: other.name != stage.name, experiment.stages)
  objective = FrameObjective(
    vqgan, matching(params, vqgan.trained), experiment.seed, sum(other.steps for other in before)
  )
  shards = math.prod(mesh.shape[axis] for axis in _RULES.model)
  side = experiment.vqgan.resolution
  frames = jax.ShapeDtypeStruct(
    (stage.frames_per_batch, side, side, 3),
    jnp.uint8,
    sharding=NamedSharding(mesh, _RULES.spec("batch")),
  )
  axes = jax.tree.map(lambda leaf: logical_axes(leaf, shards), params)
  return _Parts(objective, params, axes, {FRAMES: frames})


def _with_padded_tables(
  experiment: Experiment, stage: Stage, num_devices: int, rules: ShardingRules
) -> ModelConfig:
  """The model, its tables padded so that they divide over `tensor` in all stages."""
  if experiment.model.vocab_multiple:
    return experiment.model
  sizes = []
  for mesh in (stage.mesh, *(other.mesh for other in experiment.stages)):
    size = mesh.axis_sizes()[rules.tensor]
    sizes.append(mesh.resolve(num_devices)[rules.tensor] if size == -1 else size)
  return dataclasses.replace(experiment.model, vocab_multiple=math.lcm(*sizes))
