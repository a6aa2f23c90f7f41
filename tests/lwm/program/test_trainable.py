"""Which parameters are trained, by name."""

import jax
import pytest

from configs import models
from lwm import model as model_lib
from lwm.config.experiment import Experiment, Stage
from lwm.config.model import AdapterConfig, LoraConfig, Stretch
from lwm.model.flops import TrainedShares, body_cost
from lwm.program.trainable import num_elements, trainable, trained_shares


@pytest.fixture
def experiment():
  model = models.debug(vision_vocab_size=0)
  model.stretches = [Stretch(num_layers=1), Stretch(num_layers=1)]
  return Experiment(model=model, stages=[Stage(name="a"), Stage(name="b", trainable=["embedding"])])


def params_of(experiment):
  return model_lib.build(experiment.model).abstract()


def trained(experiment, stage):
  params = params_of(experiment)
  division = trainable(experiment, experiment.stages[stage], params)
  parts = division.split(params)
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, division.join(*parts), params))
  paths = jax.tree_util.tree_flatten_with_path(parts[0])[0]
  return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def test_patterns_match_whole_dotted_names(experiment):
  assert len(trained(experiment, 0)) == len(jax.tree.leaves(params_of(experiment)))
  experiment.optimizer.trainable = ["blocks_1.attention.*", "*.gate", "norm.scale"]
  assert trained(experiment, 0) == [
    "blocks.feed_forward.gate",
    *(f"blocks_1.attention.{name}" for name in ("key", "out", "query", "value")),
    "blocks_1.feed_forward.gate",
    "norm.scale",
  ]
  assert trained(experiment, 1) == ["embedding"]


def test_what_lora_adds_is_counted_and_trained_alone(experiment):
  plain, cost = num_elements(params_of(experiment)), body_cost(experiment.model)
  experiment.model.lora = LoraConfig(rank=3, targets=["key", "out", "up"])
  assert trained(experiment, 0) == [
    f"{blocks}.{name}_lora_{part}"
    for blocks in ("blocks", "blocks_1")
    for name in ("attention.key", "attention.out", "feed_forward.up")
    for part in "ab"
  ]
  added = num_elements(params_of(experiment)) - plain
  tuned = body_cost(experiment.model)
  assert tuned.weights - cost.weights == added
  assert tuned.flops - cost.flops == 2 * added
  assert trained_shares(experiment, experiment.stages[0]).tables == 0
  assert trained_shares(experiment, experiment.stages[0]).body == pytest.approx(
    added / tuned.weights, rel=2e-2
  )
  assert trained_shares(experiment, experiment.stages[1]) == TrainedShares(0, 0.5)


def test_adapters_are_counted_and_trained_alone(experiment):
  plain, cost = num_elements(params_of(experiment)), body_cost(experiment.model)
  experiment.model.adapter = AdapterConfig(width=3)
  assert trained(experiment, 0) == [
    "adapter_modalities",
    *(
      f"{blocks}.adapter.{name}"
      for blocks in ("blocks", "blocks_1")
      for name in ("bottleneck_in", "bottleneck_out", "router")
    ),
  ]
  width = experiment.model.width
  products = 2 * 2 * (2 * width * 3)
  added = num_elements(params_of(experiment)) - plain
  tuned = body_cost(experiment.model)
  # The routers have two columns in each layer. The embeddings of the modalities are in no layer.
  assert tuned.weights - cost.weights == products + 2 * 2 * width == added - 2 * width
  assert tuned.flops - cost.flops == 2 * products
  assert trained_shares(experiment, experiment.stages[0]).tables == 0
