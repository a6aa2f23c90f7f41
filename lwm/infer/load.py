"""The trained model of a run, for sampling: reads its newest checkpoint and changes nothing.

Safe beside a run that is still training.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from lwm import model as model_lib
from lwm.checkpoint import digests
from lwm.checkpoint.checkpoints import FileRestore
from lwm.checkpoint.identity import first_difference, with_defaults
from lwm.config.experiment import Experiment
from lwm.errors import UserError
from lwm.parallel.sharding import ShardingRules


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """A model and its parameters, on the mesh that was set when it was loaded.

  Attributes:
    model: to be called under that mesh.
    params: float32, sharded by the model's rules.
    rope_theta: of the stage that the parameters come from.
    stage: that stage's name.
    step: steps that were done of it.
    total_steps: steps that were done of the whole run.
  """

  model: model_lib.Model
  params: Any
  rope_theta: float
  stage: str
  step: int
  total_steps: int


def load_trained(experiment: Experiment, workdir: pathlib.Path) -> TrainedModel:
  """The model in the newest checkpoint of `workdir`. Call it under `jax.set_mesh`.

  Args:
    experiment: must have the model and the tokenizer that the run has; all else is the run's own.
    workdir: of `experiments.train`.

  Raises:
    UserError: there is no checkpoint, or it is damaged or one of another model or tokenizer.
  """
  directory = workdir / "checkpoints"
  manager = None
  if directory.is_dir():
    options = ocp.CheckpointManagerOptions(create=False)
    manager = ocp.CheckpointManager(directory.absolute(), options=options)
  if manager is None or manager.latest_step() is None:
    raise UserError(
      f"There is no checkpoint in {workdir}: train first, with `python -m experiments.train "
      f"--config=FILE --workdir={workdir}`."
    )
  total_steps = manager.latest_step()
  checkpoint = directory / str(total_steps)
  # Older checkpoints have no digests.
  if (checkpoint / digests.FILE_NAME).exists() and (file := digests.damaged_file(checkpoint)):
    raise UserError(
      f"{checkpoint} is damaged ({file}): `python -m experiments.train` with this --workdir sets "
      "it aside, and goes on from the one before."
    )
  stored = manager.restore(
    total_steps,
    args=ocp.args.Composite(
      progress=ocp.args.JsonRestore(), config=ocp.args.JsonRestore(), tokenizer=FileRestore()
    ),
  )
  config = with_defaults(stored.config, Experiment)
  difference = first_difference(config["model"], dataclasses.asdict(experiment.model), "model")
  if difference is None and stored.tokenizer[1] != pathlib.Path(experiment.tokenizer).read_bytes():
    difference = f"another tokenizer than {experiment.tokenizer}"
  if difference:
    raise UserError(
      f"{workdir} holds a model with {difference}: give the --config that it was trained by."
    )

  # One token does not divide over a ring.
  rules = ShardingRules(sequence=None)
  model = model_lib.build(experiment.model, rules)
  shardings = rules.tree_shardings(model.logical_axes, jax.sharding.get_mesh())
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    model.abstract(),
    shardings,
  )
  params = manager.restore(
    total_steps, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
  ).params
  manager.close()
  stage = config["stages"][stored.progress["stage"]]
  return TrainedModel(
    model=model,
    params=params,
    rope_theta=stage["rope_theta"],
    stage=stage["name"],
    step=stored.progress["step"],
    total_steps=total_steps,
  )
