"""The trained model of a run, for sampling."""

import dataclasses
import pathlib
from typing import Any

import jax

from lwm import model as model_lib
from lwm.checkpoint.identity import first_difference
from lwm.checkpoint.reader import newest
from lwm.config.experiment import Experiment
from lwm.errors import UserError
from lwm.parallel.sharding import ShardingRules


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """A model and its parameters, on the mesh that was set when it was loaded.

  Attributes:
    model: call it under that mesh.
    params: float32, sharded by the model's rules.
    rope_theta: of the stage that the parameters come from.
    stage: name of that stage.
    step: steps done of that stage.
    total_steps: steps done of the whole run.
  """

  model: model_lib.Model
  params: Any
  rope_theta: float
  stage: str
  step: int
  total_steps: int


def load_trained(experiment: Experiment, workdir: pathlib.Path) -> TrainedModel:
  """The model in the newest checkpoint of `workdir`. Call it under `jax.set_mesh`.

  It is safe to call this while the run is still training.

  Args:
    experiment: must have the run's model and tokenizer; everything else comes from the run.
    workdir: of `experiments.train`.

  Raises:
    UserError: there is no checkpoint, it is damaged, or it holds another model or tokenizer.
  """
  stored = newest(workdir)
  model_config = dataclasses.asdict(experiment.model)
  difference = first_difference(stored.config["model"], model_config, "model")
  if difference is None and stored.tokenizer != pathlib.Path(experiment.tokenizer).read_bytes():
    difference = f"another tokenizer than {experiment.tokenizer}"
  if difference:
    raise UserError(
      f"{workdir} holds a model with {difference}: give the --config that it was trained with."
    )

  # A single token cannot be divided over a ring.
  rules = ShardingRules(sequence=None)
  model = model_lib.build(experiment.model, rules)
  shardings = rules.tree_shardings(model.logical_axes, jax.sharding.get_mesh())
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    model.abstract(),
    shardings,
  )
  position = stored.position
  stage = stored.config["stages"][position.stage]
  return TrainedModel(
    model=model,
    params=stored.params(abstract),
    rope_theta=stage["rope_theta"],
    stage=stage["name"],
    step=position.step,
    total_steps=position.total_steps,
  )
