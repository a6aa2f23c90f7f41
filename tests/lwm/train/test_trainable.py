"""Runs that train a part of the parameters: the others are frozen, bit for bit."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

from lwm.config.model import AdapterConfig, LoraConfig
from lwm.errors import ConfigError, UserError
from lwm.program.stage import build_program
from lwm.train import loop
from tests.lwm.train.test_resume import final_state


@pytest.fixture
def experiment(make_experiment):
  """Two steps of text."""
  experiment = make_experiment()
  del experiment.stages[1:], experiment.datasets[1:]
  experiment.stages[0].steps, experiment.stages[0].warmup_steps = 2, 1
  experiment.model.vision_vocab_size = 0
  experiment.evaluation.every_steps = 100
  return experiment


def train(experiment, workdir):
  """Trains on one device, and returns the final parameters and moments by name."""
  loop.train(experiment, workdir, jax.devices()[:1])
  params, moments = final_state(workdir, sum(stage.steps for stage in experiment.stages))[:2]
  return traverse_util.flatten_dict(params, sep="."), moments


def changed(before, after):
  return {name for name, value in before.items() if not np.array_equal(value, after[name])}


@pytest.mark.slow
def test_each_stage_trains_what_it_names(experiment, tmp_path, capsys):
  before, moments = train(experiment, tmp_path / "all")
  stage = dataclasses.replace(experiment.stages[0], name="tables", trainable=["embedding", "*.up"])
  experiment.stages.append(stage)
  # The first stage's checkpoint is the start of the second one.
  after, moments = train(experiment, tmp_path / "all")
  assert "tables | trains 14,336 of " in capsys.readouterr().out
  assert changed(before, after) == {"embedding", "blocks.feed_forward.up"}
  shapes = [leaf.shape for leaf in jax.tree.leaves(moments) if leaf.ndim]
  assert sorted(shapes) == sorted([before[name].shape for name in changed(before, after)] * 2)
  # What was trained is part of what the run has computed.
  stage.trainable = ["embedding"]
  with pytest.raises(UserError, match="2 config.stages.1..trainable, not 1"):
    train(experiment, tmp_path / "all")


@pytest.mark.slow
def test_lora_starts_from_a_base_and_resumes(experiment, tmp_path, capsys):
  base, _ = train(experiment, tmp_path / "base")
  experiment.model.lora = LoraConfig(rank=2, targets=["query", "down"])
  experiment.init_from = str(tmp_path / "base")
  whole = dataclasses.replace(experiment, stages=[dataclasses.replace(experiment.stages[0])])
  whole.optimizer.schedule = "constant"
  whole.stages[0].steps = 4
  tuned, moments = train(whole, tmp_path / "whole")
  assert (
    "base/checkpoints/2; 640 parameters of config.model.lora are added" in capsys.readouterr().out
  )
  assert not changed(base, tuned)
  b = [name for name in tuned if name.endswith("_lora_b")]
  assert len(b) == 2 and all(np.any(tuned[name]) for name in b)
  assert sum(leaf.size for leaf in jax.tree.leaves(moments) if leaf.ndim) == 2 * 640
  # In two parts, as in one.
  train(experiment, tmp_path / "parts")
  experiment.stages = whole.stages
  resumed, _ = train(experiment, tmp_path / "parts")
  assert not changed(tuned, resumed)
  # It is a base for adapters, and stays what it is.
  adapted = dataclasses.replace(experiment, stages=[dataclasses.replace(experiment.stages[0])])
  adapted.model = dataclasses.replace(experiment.model, adapter=AdapterConfig(width=2))
  adapted.init_from, adapted.stages[0].trainable = str(tmp_path / "parts"), ["*adapter[._]*"]
  both, moments = train(adapted, tmp_path / "adapted")
  added = sum(leaf.size for name, leaf in both.items() if "adapter" in name)
  assert f"{added:,} parameters of config.model.adapter are added" in capsys.readouterr().out
  assert not changed(resumed, both) and np.any(both["blocks.adapter.bottleneck_out"])
  assert sum(leaf.size for leaf in jax.tree.leaves(moments) if leaf.ndim) == 2 * added
  # A tuned model is no base for other additions of the same kind.
  experiment.init_from = str(tmp_path / "parts")
  experiment.model.lora = LoraConfig(rank=4)
  with pytest.raises(UserError, match="holds a model with config.model.lora.rank=2, not 4"):
    train(experiment, tmp_path / "other")


def test_a_pattern_that_matches_nothing_is_one_sentence(experiment):
  experiment.optimizer.trainable = ["norm.scale", "atention.*"]
  with pytest.raises(ConfigError, match="optimizer.trainable: 'atention.*' matches no parameter"):
    build_program(experiment, experiment.stages[0], jax.devices()[:1])
