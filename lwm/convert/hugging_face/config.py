"""Hugging Face's config.json to the settings of a model, and back."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lwm.config.model import ModelConfig, RopeScaling
from lwm.config.vqgan import VisionLayout
from lwm.convert.hugging_face.experts import experts_problem, read_experts, write_experts
from lwm.convert.hugging_face.names import (
  ARCHITECTURES,
  LLAMA,
  MISTRAL,
  MIXTRAL,
  QWEN2,
  QWEN3,
  QWEN3_MOE,
  Architecture,
)
from lwm.errors import UserError

CONFIG = "config.json"
# Our own key there for models with vision ids.
VISION = "lwm_vision"

# Defaults of all classes; those of a class that differ are in its Architecture. Sizes have none.
_DEFAULTS = {
  "num_key_value_heads": None,
  "head_dim": None,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e4,
  "sliding_window": None,
  "tie_word_embeddings": False,
  "hidden_act": "silu",
  "use_sliding_window": False,
}
_SIZES = (
  "num_hidden_layers",
  "hidden_size",
  "num_attention_heads",
  "intermediate_size",
  "vocab_size",
  "max_position_embeddings",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")
_MAX_SIZE = 2**31 - 1
# More layers than any model has: a table of them would take memory without end.
_MAX_LAYERS = 10_000
_MAX_NUMBER = float(np.finfo(np.float32).max)
# Settings that change the computation, with the values that ours has. `swish` is `silu`.
_ONLY = {
  "hidden_act": ("silu", "swish"),
  "attention_bias": (None, False),
  "mlp_bias": (None, False),
  "partial_rotary_factor": (None, 1),
  "attn_logit_softcapping": (None,),
  "final_logit_softcapping": (None,),
  "quantization_config": (None,),
  "tie_word_embeddings": (None, False, True),
  "use_sliding_window": (None, False, True),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a config.json says.

  Attributes:
    architecture: the class.
    model: the settings of the model.
    rope_theta: base of RoPE.
    context: tokens of the longest context.
  """

  architecture: Architecture
  model: ModelConfig
  rope_theta: float
  context: int


def read_config(path: pathlib.Path, content: Mapping[str, Any]) -> Settings:
  """Reads the content of a config.json; missing keys have the defaults of the model's class.

  Args:
    path: of the file, for messages.
    content: the JSON object.

  Raises:
    UserError: the class is not known, a size is missing, or a setting is not supported.
  """
  architecture = ARCHITECTURES.get(str(content.get("model_type")))
  if architecture is None:
    raise UserError(
      f"{path}: model_type {content.get('model_type')!r} is not supported: it must be one of "
      f"{', '.join(ARCHITECTURES)}."
    )
  settings = {**_DEFAULTS, **architecture.defaults, **content}
  stated = [name for name in _OPTIONAL_SIZES if settings[name] is not None]
  if wrong := [name for name in (*_SIZES, *stated) if not _is_size(settings.get(name))]:
    raise UserError(f"{path}: {wrong[0]} must be a positive integer: get the file again.")
  if settings["num_hidden_layers"] > _MAX_LAYERS:
    raise UserError(
      f"{path}: num_hidden_layers is {settings['num_hidden_layers']}, more than {_MAX_LAYERS}: get "
      "the file again."
    )
  # Classes with biases in every model do not read the setting.
  ignored = ("attention_bias",) if architecture.attention_bias else ()
  for name, allowed in _ONLY.items():
    if name not in ignored and settings.get(name) not in allowed:
      raise _unsupported(path, name, settings[name])
  heads, context = settings["num_attention_heads"], settings["max_position_embeddings"]
  theta, scaling = _rope(path, settings)
  text, vision = _vocabularies(path, settings)
  experts, stretches = read_experts(path, settings, architecture)
  model = ModelConfig(
    num_layers=settings["num_hidden_layers"],
    stretches=stretches,
    width=settings["hidden_size"],
    num_heads=heads,
    num_kv_heads=settings["num_key_value_heads"] or heads,
    head_dim=settings["head_dim"] or settings["hidden_size"] // heads,
    feed_forward_width=settings["intermediate_size"],
    text_vocab_size=text,
    vision_vocab_size=vision,
    norm_epsilon=_number(path, "rms_norm_eps", settings["rms_norm_eps"]),
    tied_head=bool(settings["tie_word_embeddings"]),
    rope_scaling=scaling,
    sliding_window=_window(path, settings, architecture),
    attention_bias=architecture.attention_bias,
    query_key_norm=architecture.query_key_norm,
    experts=experts,
  )
  return Settings(architecture, model, theta, context)


def architecture_of(config: ModelConfig) -> Architecture:
  """The class that computes what our model does.

  Raises:
    UserError: no class does.
  """
  problem = None
  if config.attention_soft_cap is not None:
    problem = f"attention_soft_cap={config.attention_soft_cap}"
  elif config.attention_bias and config.query_key_norm:
    problem = "attention_bias and query_key_norm together"
  elif config.experts is not None:
    problem = experts_problem(config)
  if problem:
    raise UserError(
      f"config.model: no class of transformers that is exported to has {problem}: such a model "
      "can only be used here."
    )
  if config.experts is not None:
    return QWEN3_MOE if config.query_key_norm else MIXTRAL
  if config.query_key_norm:
    return QWEN3
  if config.attention_bias:
    return QWEN2
  # Llama has no window, and wants a width that its heads divide.
  if config.sliding_window is not None or config.width % config.num_heads:
    return MISTRAL
  return LLAMA


def write_config(
  settings: Settings, dtype: str, marks: Mapping[str, Any], layout: VisionLayout | None
) -> dict[str, Any]:
  """The content of a config.json.

  RoPE is spelled twice, as transformers 5 does and as earlier versions do; each version reads both
  alike.

  Args:
    settings: what it says.
    dtype: of the tensors.
    marks: bos_token_id and eos_token_id.
    layout: of the vision ids, if the model has any.
  """
  model, architecture = settings.model, settings.architecture
  scaling = _scaling(model.rope_scaling)
  content: dict[str, Any] = {
    "architectures": [architecture.class_name],
    "model_type": architecture.model_type,
    "vocab_size": model.vocab_size,
    "hidden_size": model.width,
    "intermediate_size": model.feed_forward_width,
    "num_hidden_layers": model.num_layers,
    "num_attention_heads": model.num_heads,
    "num_key_value_heads": model.num_kv_heads,
    "head_dim": model.head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": model.norm_epsilon,
    "max_position_embeddings": settings.context,
    "rope_parameters": {**scaling, "rope_theta": settings.rope_theta},
    "rope_theta": settings.rope_theta,
    "rope_scaling": scaling if model.rope_scaling else None,
    "tie_word_embeddings": model.tied_head,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": model.sliding_window,
    "initializer_range": model.initializer_std,
    "use_cache": True,
    "dtype": dtype,
    "torch_dtype": dtype,
    **marks,
    **write_experts(model),
  }
  if architecture.window == "named":
    content["use_sliding_window"] = model.sliding_window is not None
    # The first layer that has the window.
    content["max_window_layers"] = 0 if model.sliding_window else model.num_layers
  if layout:
    content[VISION] = {
      "text_vocab_size": model.text_vocab_size,
      "vision_vocab_size": model.vision_vocab_size,
      "codes_per_frame": layout.codes_per_frame,
      "end_of_frame": model.text_vocab_size + layout.end_of_frame,
      "end_of_vision": model.text_vocab_size + layout.end_of_vision,
    }
  return content


def _is_size(value: Any) -> bool:
  return type(value) is int and 0 < value <= _MAX_SIZE


def _number(path: pathlib.Path, name: str, value: Any) -> float:
  if type(value) not in (int, float) or not 0 < value <= _MAX_NUMBER:
    raise UserError(f"{path}: {name}={value!r} must be a positive number: get the file again.")
  return value


def _unsupported(path: pathlib.Path, name: str, value: Any) -> UserError:
  return UserError(f"{path}: {name}={value!r} is not supported: import a model without it.")


def _rope(path: pathlib.Path, settings: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """Theta and scaling. Where versions differ in their spelling, transformers 5 decides."""
  rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
  if not isinstance(rope, dict):
    raise _unsupported(path, "rope_parameters", rope)
  theta = _number(path, "rope_theta", rope.get("rope_theta", settings["rope_theta"]))
  if rope.get("partial_rotary_factor") not in _ONLY["partial_rotary_factor"]:
    raise _unsupported(path, "partial_rotary_factor", rope["partial_rotary_factor"])
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise UserError(
      f"{path}: rope_type {kind!r} is not supported, only default and llama3: import a model with "
      "one of these."
    )
  rope = {"original_max_position_embeddings": settings["max_position_embeddings"], **rope}
  names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
  factor, low, high, original = (_number(path, name, rope.get(name)) for name in names)
  if low >= high or not _is_size(original):
    raise UserError(
      f"{path}: rope_type 'llama3' has low_freq_factor={low}, high_freq_factor={high} and "
      f"original_max_position_embeddings={original}, which do not fit each other: get the file "
      "again."
    )
  return theta, RopeScaling(factor, low, high, int(original))


def _scaling(scaling: RopeScaling | None) -> dict[str, Any]:
  if scaling is None:
    return {"rope_type": "default"}
  return {
    "rope_type": "llama3",
    "factor": scaling.factor,
    "low_freq_factor": scaling.low_frequency_factor,
    "high_freq_factor": scaling.high_frequency_factor,
    "original_max_position_embeddings": scaling.original_context,
  }


def _window(
  path: pathlib.Path, settings: Mapping[str, Any], architecture: Architecture
) -> int | None:
  """The sliding window of all layers."""
  window, first = settings["sliding_window"], 0
  if architecture.window == "named":
    window = window if settings["use_sliding_window"] else None
    first = settings["max_window_layers"]
    if type(first) is not int:
      raise _unsupported(path, "max_window_layers", first)
  elif architecture.window == "no":
    window = None
  kinds = [
    "full_attention" if window is None or layer < first else "sliding_attention"
    for layer in range(settings["num_hidden_layers"])
  ]
  stated = settings.get("layer_types") or kinds
  if architecture.window == "named":
    kinds = stated
  uniform = isinstance(stated, list) and set(map(str, stated)) in (
    {"full_attention"},
    {"sliding_attention"},
  )
  if stated != kinds or not uniform:
    raise UserError(
      f"{path}: a sliding window in some layers only is not supported: import a model that has it "
      "in all layers, or in none."
    )
  return window if kinds[0] == "sliding_attention" else None


def _vocabularies(path: pathlib.Path, settings: Mapping[str, Any]) -> tuple[int, int]:
  """Numbers of text ids and of vision ids."""
  vision = settings.get(VISION)
  if vision is None:
    return settings["vocab_size"], 0
  if not isinstance(vision, dict):
    raise _unsupported(path, VISION, vision)
  sizes: tuple[Any, Any] = vision.get("text_vocab_size"), vision.get("vision_vocab_size")
  if not all(map(_is_size, sizes)) or sum(sizes) != settings["vocab_size"]:
    raise UserError(
      f"{path}: the text_vocab_size and vision_vocab_size of {VISION} do not add up to vocab_size "
      f"{settings['vocab_size']}: get the file again."
    )
  return sizes
