"""A stage as programs: its mesh, its shardings and its compiled steps.

Nothing here touches data or files. The devices may belong to an ahead-of-time topology, so that a
planner compiles exactly what a run would.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from kernels.ring import Layout
from lwm import model as model_lib
from lwm.config.batch import FIELDS
from lwm.config.experiment import Experiment, Stage
from lwm.config.model import ModelConfig
from lwm.config.validate import check_model_fits_mesh
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import ShardingRules
from lwm.program import optimizer as optimizer_lib, state as state_lib, step as step_lib
from lwm.program.objective import Objective
from lwm.program.state import TrainState
from lwm.program.trainable import Trainable, num_elements, trainable


@dataclasses.dataclass(frozen=True)
class StageProgram:
  """What a stage runs, under `jax.set_mesh(program.mesh)`.

  `train_step(state, batch, loss_limit) -> (state, metrics)`, which donates its state, and
  `evaluation_step(params, batch) -> (nll sums [2], weights [2])` are jitted; see
  lwm/program/step.py.
  """

  model: model_lib.Model
  mesh: jax.sharding.Mesh
  layout: Layout
  state: TrainState  # ShapeDtypeStructs with shardings.
  batch_sharding: NamedSharding
  optimizer: Any
  trainable: Trainable
  train_step: Any
  evaluation_step: Any

  def initial_params(self, seed: int) -> Any:
    """Random parameters, each shard made on its own device."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state.params)
    return jax.jit(self.model.init, out_shardings=shardings)(jax.random.key(seed))

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

  def abstract_batch(self, rows: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the batches that the steps are compiled for."""
    return {
      name: jax.ShapeDtypeStruct((rows, sequence_length), dtype, sharding=self.batch_sharding)
      for name, dtype in FIELDS.items()
    }


def build_program(
  experiment: Experiment, stage: Stage, devices: Sequence[jax.Device] | None = None
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
  rules = ShardingRules()
  config = _with_padded_tables(experiment, stage, mesh.size, rules)
  check_model_fits_mesh(config, mesh.shape, rules)
  model = model_lib.build(config, rules)
  layout = Layout(stage.layout, mesh.shape[rules.ring])
  abstract_params = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    model.abstract(),
    rules.tree_shardings(model.logical_axes, mesh),
  )
  trained = trainable(experiment, stage, abstract_params)
  optimizer = optimizer_lib.adamw(experiment.optimizer, stage, trained.split(model.logical_axes)[0])
  replicated = NamedSharding(mesh, rules.spec())
  state = state_lib.abstract_state(
    abstract_params, optimizer, trained, mesh, experiment.optimizer.offload
  )

  objective = Objective(
    model, experiment.loss, stage.rope_theta, layout, stage.accumulation_steps, trained
  )
  train_step = jax.jit(
    functools.partial(
      step_lib.train_step,
      objective=objective,
      optimizer=optimizer,
      learning_rate=optimizer_lib.learning_rate(experiment.optimizer, stage),
    ),
    out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated),
    donate_argnums=0,
  )
  evaluation_step = jax.jit(
    functools.partial(step_lib.evaluation_step, objective=objective), out_shardings=replicated
  )
  return StageProgram(
    model=model,
    mesh=mesh,
    layout=layout,
    state=state,
    batch_sharding=NamedSharding(mesh, rules.spec("batch", "sequence")),
    optimizer=optimizer,
    trainable=trained,
    train_step=train_step,
    evaluation_step=evaluation_step,
  )


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
