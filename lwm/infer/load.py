"""The trained model of a run, or imported weights, for sampling."""

import dataclasses
import pathlib
from typing import Any

from lwm import model as model_lib
from lwm.checkpoint.reader import newest
from lwm.config.experiment import Experiment, Stage
from lwm.infer.weights import load_params
from lwm.parallel.sharding import ShardingRules


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """A model and its parameters, on the mesh that was set when it was loaded.

  Attributes:
    model: call it under that mesh.
    params: in the form that was asked for, sharded by the model's rules.
    experiment: what the checkpoint was made with.
    tokenizer: the tokenizer's file in the checkpoint.
    stage: of the experiment, the one that the parameters come from.
    total_steps: steps done of the whole run; 0 for imported weights.
  """

  model: model_lib.Model
  params: Any
  experiment: Experiment
  tokenizer: pathlib.Path
  stage: Stage
  total_steps: int

  @property
  def rope_theta(self) -> float:
    """Base of RoPE of the stage that the parameters come from."""
    return self.stage.rope_theta


def load_trained(workdir: pathlib.Path, weights: str = "float32") -> TrainedModel:
  """The model in the newest checkpoint of `workdir`. Call it under `jax.set_mesh`.

  It is safe to call this while the run is still training.

  Args:
    workdir: of `experiments.train`, one of its checkpoints, or imported weights.
    weights: the form of the parameters, one of `weights.FORMS`.

  Raises:
    UserError: there is no checkpoint, it is damaged, or quantized groups do not divide over the
      mesh.
  """
  stored = newest(workdir)
  experiment = stored.experiment
  # A single token cannot be divided over a ring.
  model = model_lib.build(experiment.model, ShardingRules(sequence=None))
  return TrainedModel(
    model=model,
    params=load_params(stored, model, weights),
    experiment=experiment,
    tokenizer=stored.tokenizer_path,
    stage=stored.stage,
    total_steps=stored.position.total_steps,
  )
