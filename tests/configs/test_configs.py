"""Every config is valid, fits its intended devices, and equals its golden dump."""

import dataclasses
import os
import pathlib

import pytest

from configs import (
  experts_fine_16b,
  experts_lwm_vision_8x7b,
  experts_mixtral_8x7b,
  laptop,
  laptop_experts,
  laptop_lora,
  lwm_text_7b,
  lwm_vision_7b,
  models,
  retrieval,
  text_1b,
  text_llama3_8b,
  text_qwen3_8b,
  vqgan_laptop,
  vqgan_lwm,
)
from lwm.config import experiment as experiment_lib
from lwm.config.model import (
  AdapterConfig,
  ExpertsConfig,
  LoraConfig,
  ModelConfig,
  Stretch,
  expert_stretches,
)
from lwm.config.validate import check_devices, validate
from lwm.errors import ConfigError
from lwm.model.flops import body_cost, vocabulary_weights

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIGS = {
  "experts_fine_16b": (experts_fine_16b, 256),
  "experts_lwm_vision_8x7b": (experts_lwm_vision_8x7b, 512),
  "experts_mixtral_8x7b": (experts_mixtral_8x7b, 256),
  "laptop": (laptop, 1),
  "laptop_experts": (laptop_experts, 1),
  "laptop_lora": (laptop_lora, 1),
  "lwm_text_7b": (lwm_text_7b, 256),
  "lwm_vision_7b": (lwm_vision_7b, 512),
  "retrieval": (retrieval, 1),
  "text_1b": (text_1b, 1),
  "text_llama3_8b": (text_llama3_8b, 64),
  "text_qwen3_8b": (text_qwen3_8b, 64),
  "vqgan_laptop": (vqgan_laptop, 1),
  "vqgan_lwm": (vqgan_lwm, 8),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_valid_and_as_dumped(name):
  """After an intended change, run UPDATE_GOLDEN=1 pytest tests/configs and review the diff."""
  module, num_devices = CONFIGS[name]
  experiment = module.get_config()
  validate(experiment)
  check_devices(experiment, num_devices)
  golden = GOLDEN / f"{name}.txt"
  if os.environ.get("UPDATE_GOLDEN"):
    golden.write_text(experiment_lib.dump(experiment))
  assert experiment_lib.dump(experiment) == golden.read_text()


def test_configs_share_no_mutable_parts():
  for module, _ in CONFIGS.values():
    stages = module.get_config().stages
    entries = [id(entry) for stage in stages for entry in stage.mixture]
    assert len(set(entries)) == len(entries)
    assert len({id(stage.mesh) for stage in stages}) == len(stages)


def test_lwm_recipes_train_on_the_tokens_that_the_paper_says():
  """Tokens per stage, in billions, to the paper's rounding (arXiv 2402.08268; 4M is 2**22)."""

  def billions(config):
    return [stage.tokens_per_batch * stage.steps / 1e9 for stage in config.get_config().stages]

  text, vision = billions(lwm_text_7b), billions(lwm_vision_7b)
  assert text == pytest.approx([4.8, 12, 12, 3, 1.8], rel=0.06)
  assert vision == pytest.approx([363, 107, 10, 3.5, 0.4], rel=0.1)


@pytest.mark.parametrize(
  "model, billions",
  [
    (models.lwm_7b(), 6.738),
    (models.lwm_13b(), 13.016),
    (models.llama3_8b(), 8.030),
    (models.qwen3_8b(), 8.191),
  ],
)
def test_model_sizes_have_the_published_number_of_parameters(model: ModelConfig, billions):
  attention = model.width * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
  block = attention + 3 * model.width * model.feed_forward_width + 2 * model.width
  total = model.num_layers * block + 2 * model.vocab_size * model.width + model.width
  assert total / 1e9 == pytest.approx(billions, abs=1e-3)


def _experiment(**changes):
  experiment = laptop.get_config()
  for path, value in changes.items():
    node, names = experiment, path.split("__")
    for name in names[:-1]:
      node = node[int(name)] if name.isdigit() else getattr(node, name)
    setattr(node, names[-1], value)
  return experiment


@pytest.mark.parametrize(
  "changes, named",
  [
    ({"model__num_kv_heads": 3}, ["num_heads=4", "num_kv_heads=3"]),
    ({"model__remat": "some"}, ["remat='some'", "'full'"]),
    ({"model__head_dim": 7}, ["head_dim=7"]),
    ({"model__stretches": [Stretch("dense", 3)]}, ["stretches", "3 layers", "num_layers=4"]),
    ({"model__stretches": [Stretch("dense", 4), Stretch("dense", 0)]}, ["stretches[1]", "=0"]),
    ({"model__stretches": [Stretch("experts", 4)]}, ["stretches[0].kind='experts'", "experts"]),
    ({"model__experts": ExpertsConfig(2, 3)}, ["experts_per_token=3", "num_experts=2"]),
    ({"model__experts": ExpertsConfig(router="hash")}, ["experts.router='hash'", "'sigmoid'"]),
    ({"model__experts": ExpertsConfig(capacity_factor=0)}, ["experts.capacity_factor=0"]),
    ({"model__experts": ExpertsConfig(placement="copy")}, ["experts.placement='copy'", "'home'"]),
    ({"model__experts": ExpertsConfig(spare_slots=0)}, ["experts.spare_slots=0"]),
    ({"model__experts": ExpertsConfig(load_decay=1)}, ["experts.load_decay=1"]),
    ({"model__sliding_window": 0}, ["sliding_window=0"]),
    ({"model__attention_soft_cap": 0.0}, ["attention_soft_cap=0.0"]),
    ({"model__lora": LoraConfig(rank=0)}, ["model.lora.rank=0"]),
    ({"model__lora": LoraConfig(targets=["head"])}, ["lora.targets[0]='head'", "'query'"]),
    ({"model__adapter": AdapterConfig(temperature=0)}, ["model.adapter.temperature=0"]),
    ({"stages__0__mixture__0__dataset": "txt"}, ["stages[0].mixture[0]", "'text'"]),
    ({"stages__1__tokens_per_batch": 1500}, ["stages[1]", "1500", "1024"]),
    ({"stages__1__layout": "striped"}, ["'striped'", "'zigzag'"]),
    ({"stages__2__mesh__ring": 3}, ["sequence_length=1024", "ring=3", "zigzag"]),
    (
      {"stages__2__mesh__ulysses": 3},
      ["sequence_length=1024", "ring x ulysses x tensor = 1 x 3 x 1"],
    ),
    ({"stages__0__warmup_steps": 10**6}, ["warmup_steps", "steps"]),
    ({"stages__0__accumulation_steps": 3}, ["accumulation_steps=3", "8 rows"]),
    ({"stages__0__name": "video_1k"}, ["stages", "video_1k"]),
    ({"datasets__0__weighting": "document"}, ["weighting", "'example'"]),
    ({"loss__text_weight": 0.0, "loss__vision_weight": 0.0}, ["text_weight", "vision_weight"]),
    ({"optimizer__peak_learning_rate": -1.0}, ["peak_learning_rate=-1.0"]),
    ({"optimizer__weight_decay": float("nan")}, ["optimizer.weight_decay=nan"]),
    ({"optimizer__epsilon": 0.0}, ["optimizer.epsilon=0.0"]),
    ({"stages__3__peak_learning_rate": -1e-3}, ["stages[3].peak_learning_rate=-0.001"]),
    ({"stages__0__end_learning_rate": -1e-3}, ["stages[0].end_learning_rate=-0.001"]),
    ({"stages__2__mixture__1__weight": -1.0}, ["stages[2].mixture[1].weight=-1.0"]),
    ({"loss__z_loss": -1e-4}, ["loss.z_loss=-0.0001"]),
    ({"stages": []}, ["stages"]),
  ],
)
def test_a_wrong_combination_is_one_message_that_names_the_settings(changes, named):
  with pytest.raises(ConfigError) as error:
    validate(_experiment(**changes))
  message = str(error.value)
  assert "\n" not in message
  assert all(name in message for name in named), message


@pytest.mark.parametrize(
  "changes, devices, named",
  [
    ({"stages__0__mesh__tensor": 3}, 8, ["tensor=3", "8 devices"]),
    ({"stages__0__mesh__fsdp": 2}, 8, ["fsdp=2", "8 devices"]),
    ({"stages__0__mesh__data": -1}, 8, ["one axis"]),
    ({}, 16, ["stages[0]", "8 rows", "1 x 16 x 1"]),
    ({"stages__0__mesh__ring": 2}, 32, ["stages[0]", "8 rows", "1 x 16 x 1"]),
    (
      {"model__experts": ExpertsConfig(12), "stages__0__mesh__expert": 8},
      8,
      ["experts.num_experts = 12", "expert x ulysses = 8 x 1"],
    ),
  ],
)
def test_a_mesh_that_does_not_fit_is_one_message(changes, devices, named):
  with pytest.raises(ConfigError) as error:
    check_devices(_experiment(**changes), devices)
  assert all(name in str(error.value) for name in named), str(error.value)


def test_dump_shows_every_setting():
  text = experiment_lib.dump(laptop.get_config())
  for field in dataclasses.fields(ModelConfig):
    assert f"{field.name}=" in text


def test_stretches_of_experts():
  kinds = [(stretch.kind, stretch.num_layers) for stretch in expert_stretches(7, first=1, every=3)]
  assert kinds == [("dense", 1), ("experts", 1), ("dense", 2), ("experts", 1), ("dense", 2)]
  assert expert_stretches(3) == [Stretch("experts", 3)]


@pytest.mark.parametrize(
  "model, billions, active_billions",
  [(models.mixtral_8x7b(), 46.70, 12.88), (models.fine_grained_16b(), 16.38, 2.83)],
)
def test_models_with_experts_have_the_published_number_of_parameters(
  model: ModelConfig, billions, active_billions
):
  cost, tables = body_cost(model), vocabulary_weights(model)
  assert (cost.weights + tables) / 1e9 == pytest.approx(billions, abs=0.01)
  assert (cost.flops / 2 + tables) / 1e9 == pytest.approx(active_billions, abs=0.01)


def test_a_token_of_the_laptop_experts_uses_as_many_flops_as_a_dense_one():
  model = laptop_experts.get_config().model
  dense, experts = body_cost(laptop_experts.get_config("dense").model), body_cost(model)
  assert model.experts is not None
  router = 2 * model.num_layers * model.width * model.experts.num_experts
  assert experts.flops == dense.flops + router and router < 0.011 * dense.flops
  assert experts.weights > 2 * dense.weights
