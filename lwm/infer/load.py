"""The trained model of a run, or imported weights, for sampling."""

import dataclasses
import math
import pathlib
from typing import Any

import jax

from lwm import model as model_lib
from lwm.checkpoint.reader import StoredCheckpoint, newest
from lwm.config.experiment import Experiment, Stage
from lwm.config.validate import check_model_fits_mesh
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
    identity: names the checkpoint, by a hash of its files.
    total_steps: steps done of the whole run; 0 for imported weights.
  """

  model: model_lib.Model
  params: Any
  experiment: Experiment
  tokenizer: pathlib.Path
  stage: Stage
  identity: str
  total_steps: int

  @property
  def rope_theta(self) -> float:
    """Base of RoPE of the stage that the parameters come from."""
    return self.stage.rope_theta


def load_trained(workdir: pathlib.Path, weights: str = "float32") -> TrainedModel:
  """The model in the newest checkpoint of `workdir`; see `load_stored`."""
  return load_stored(newest(workdir), weights)


def load_stored(stored: StoredCheckpoint, weights: str = "float32") -> TrainedModel:
  """The model in a checkpoint. Call it under `jax.set_mesh`.

  It is safe to call this while the run is still training.

  Args:
    stored: of a run of `experiments.train`, or imported weights.
    weights: the form of the parameters, one of `weights.FORMS`.

  Raises:
    UserError: the checkpoint is damaged, or the model does not divide over the mesh.
  """
  experiment, sizes = stored.experiment, jax.sharding.get_abstract_mesh().shape
  rules = ShardingRules.inference(few_tokens=True)
  multiple = math.lcm(max(experiment.model.vocab_multiple, 1), sizes[rules.tensor])
  config = dataclasses.replace(experiment.model, vocab_multiple=multiple)
  # Prompts are divided, so their rules ask for more than those of single tokens.
  check_model_fits_mesh(config, sizes, ShardingRules.inference(few_tokens=False))
  model = model_lib.build(config, rules)
  return TrainedModel(
    model=model,
    params=load_params(stored, model, weights),
    experiment=experiment,
    tokenizer=stored.tokenizer_path,
    stage=stored.stage,
    identity=stored.identity,
    total_steps=stored.position.total_steps,
  )
