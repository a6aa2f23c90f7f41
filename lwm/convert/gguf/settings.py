"""The metadata of a GGUF file that describe its model, from and to our settings.

The keys are documented in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from lwm.config.model import ModelConfig, RopeScaling
from lwm.convert.gguf.file import GGUFSource
from lwm.convert.gguf.names import ARCHITECTURES, EMBEDDING, HEAD
from lwm.errors import UserError
from lwm.model import rope

Metadata = dict[str, Any]

# (key without its prefix, the architecture; our setting).
_SETTINGS = (
  ("block_count", "num_layers"),
  ("embedding_length", "width"),
  ("attention.head_count", "num_heads"),
  ("attention.head_count_kv", "num_kv_heads"),
  ("attention.key_length", "head_dim"),
  ("feed_forward_length", "feed_forward_width"),
  ("attention.sliding_window", "sliding_window"),
)
# Other sizes of a head: a file may leave them out, but they must be head_dim.
_HEAD_SIZES = ("attention.value_length", "rope.dimension_count")
_EPSILON = "attention.layer_norm_rms_epsilon"
_CONTEXT = "context_length"
_THETA = "rope.freq_base"
_DEFAULT_THETA = 1e4
_REQUIRED = {
  "block_count",
  "embedding_length",
  "attention.head_count",
  "feed_forward_length",
  _EPSILON,
  _CONTEXT,
}
# Keys that change nothing, or repeat what shapes say.
_IGNORED = {
  "vocab_size",
  "tensor_data_layout",
  "rope.scaling.original_context_length",
  "rope.scaling.finetuned",
}
# Keys of what we do not compute, and the values with which they have no effect.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
  "expert_count": (0,),
  "expert_used_count": (0,),
  "rope.scaling.type": ("none",),
  "rope.scaling.factor": (0, 1),
  "rope.scale_linear": (0, 1),
  "attention.causal": (True,),
}
# GGUF has no keys for these: the parameters of Llama-3 scaling, whose result is a tensor, and the
# number of ids, the last ones, that are vision codes. Other programs ignore our keys.
_SCALING = "lwm.rope_scaling."
_VISION = "lwm.vision_vocab_size"
# Largest relative difference from the factors of a file, which were computed in float32.
_TOLERANCE = 1e-5
_MAX_SIZE = 2**31 - 1
_MAX_NUMBER = float(np.finfo(np.float32).max)


class GGUFModel(NamedTuple):
  """What a GGUF file says of its model.

  Attributes:
    architecture: `general.architecture`, which decides the names and layouts of the tensors.
    name: `general.name`.
    config: settings of the model.
    rope_theta: base of the rotary frequencies.
    context_length: in tokens.
  """

  architecture: str
  name: str
  config: ModelConfig
  rope_theta: float
  context_length: int


def architecture_of(config: ModelConfig) -> str:
  """The architecture that other runtimes know a model of these settings by.

  Raises:
    UserError: GGUF has none.
  """
  kinds = {stretch.kind for stretch in config.resolved_stretches} - {"dense"}
  unknown = [f"model.stretches of kind {kind!r}" for kind in sorted(kinds)]
  if config.attention_soft_cap is not None:
    unknown.append("model.attention_soft_cap")
  if config.attention_bias and config.query_key_norm:
    unknown.append("both model.attention_bias and model.query_key_norm")
  if unknown:
    raise UserError(f"No GGUF architecture has {unknown[0]}: export the model to another format.")
  if config.attention_bias:
    return "qwen2"
  return "qwen3" if config.query_key_norm else "llama"


def model_metadata(model: GGUFModel) -> Metadata:
  """The keys that `read_model` reads."""
  config = model.config
  values: Metadata = {key: getattr(config, setting) for key, setting in _SETTINGS}
  values |= dict.fromkeys(_HEAD_SIZES, config.head_dim)
  values |= {
    _EPSILON: config.norm_epsilon,
    _CONTEXT: model.context_length,
    _THETA: float(model.rope_theta),
    "vocab_size": config.vocab_size,
  }
  metadata: Metadata = {"general.architecture": model.architecture, "general.name": model.name}
  metadata |= {
    f"{model.architecture}.{key}": value for key, value in values.items() if value is not None
  }
  if config.vision_vocab_size:
    metadata[_VISION] = config.vision_vocab_size
  if config.rope_scaling:
    for name, value in dataclasses.asdict(config.rope_scaling).items():
      metadata[_SCALING + name] = value
  return metadata


def rope_factors(model: GGUFModel) -> np.ndarray | None:
  """What Llama-3 scaling divides the rotary frequencies by, float32 [D/2]; None without it."""
  config = model.config
  if config.rope_scaling is None:
    return None
  return _factors(config.head_dim, model.rope_theta, config.rope_scaling)


def read_model(source: GGUFSource) -> GGUFModel:
  """The model of a file.

  Raises:
    UserError: its architecture is unknown, or a key is missing or means what we do not compute.
  """
  metadata = source.metadata
  architecture = metadata.get("general.architecture")
  if architecture not in ARCHITECTURES:
    raise UserError(
      f"{source.path}: general.architecture is {architecture!r}, which is not supported: convert a "
      f"model of {', '.join(ARCHITECTURES)}."
    )
  if metadata.get("split.count", 1) != 1:
    raise UserError(
      f"{source.path} is one of {metadata['split.count']} files of a model: join them with "
      "`llama-gguf-split --merge` of llama.cpp."
    )
  if EMBEDDING not in source.tensors:
    raise UserError(f"{source.path} lacks the tensor {EMBEDDING}: get all files of the model.")
  values = _checked_values(source, f"{architecture}.")
  settings = {setting: values[key] for key, setting in _SETTINGS if key in values}
  settings.setdefault("num_kv_heads", settings["num_heads"])
  settings.setdefault("head_dim", settings["width"] // settings["num_heads"])
  for key in _HEAD_SIZES:
    if values.get(key, settings["head_dim"]) != settings["head_dim"]:
      raise UserError(
        f"{source.path}: {architecture}.{key} is {values[key]} and not the size of a head, "
        f"{settings['head_dim']}, which is not supported: convert another model."
      )
  heads, kv_heads, head_dim = (settings[x] for x in ("num_heads", "num_kv_heads", "head_dim"))
  if heads % kv_heads or head_dim % 2 or not head_dim:
    raise UserError(
      f"{source.path}: {heads} query heads, {kv_heads} key heads and heads of size {head_dim} do "
      "not fit each other: get the file again."
    )
  num_rows = source.tensors[EMBEDDING].shape[0]
  num_vision = metadata.get(_VISION, 0)
  if type(num_vision) is not int or not 0 <= num_vision < num_rows:
    raise UserError(
      f"{source.path}: {_VISION} is {num_vision!r} of {num_rows} ids: get the file again."
    )
  theta = _shortest(values.get(_THETA, _DEFAULT_THETA))
  config = ModelConfig(
    **settings,
    text_vocab_size=num_rows - num_vision,
    vision_vocab_size=num_vision,
    norm_epsilon=_shortest(values[_EPSILON]),
    tied_head=HEAD not in source.tensors,
    attention_bias=architecture == "qwen2",
    query_key_norm=architecture == "qwen3",
    rope_scaling=_read_scaling(source, head_dim, theta),
  )
  name = str(metadata.get("general.name", source.path.stem))
  return GGUFModel(architecture, name, config, theta, values[_CONTEXT])


def _checked_values(source: GGUFSource, prefix: str) -> Metadata:
  """The values by key, without the prefix, of what we compute."""
  keys = (key for key in source.metadata if key.startswith(prefix))
  values = {key.removeprefix(prefix): source.metadata[key] for key in keys}
  if missing := sorted(_REQUIRED - values.keys()):
    raise UserError(f"{source.path} lacks the key {prefix}{missing[0]}: get a complete file.")
  integers = {key for key, _ in _SETTINGS} | {*_HEAD_SIZES, _CONTEXT}
  known: Metadata = {}
  for key, value in values.items():
    place = f"{source.path}: {prefix}{key} is {_brief(value)}"
    if key in integers or key in (_EPSILON, _THETA):
      kinds, most = ((int,), _MAX_SIZE) if key in integers else ((int, float), _MAX_NUMBER)
      if type(value) not in kinds or not 0 <= value <= most:
        raise UserError(f"{place}, not a number that a model of this architecture can have there.")
      if value == 0 and key == "attention.sliding_window":
        continue
      if not value:
        raise UserError(f"{place}: get the file again.")
      known[key] = value
    elif key in _WITHOUT_EFFECT:
      if value not in _WITHOUT_EFFECT[key]:
        raise UserError(f"{place}, which is not supported: convert a model without it.")
    elif key not in _IGNORED:
      raise UserError(f"{place}, a setting which is not known: convert a model without it.")
  # Each layer has tensors of its own, so that a wrong count ends here.
  if known["block_count"] > len(source.tensors):
    raise UserError(
      f"{source.path}: {prefix}block_count is {known['block_count']}, but the file holds only "
      f"{len(source.tensors)} tensors: get a complete file."
    )
  if long := [name for name in source.tensors if name.startswith("rope_factors_")]:
    raise UserError(
      f"{source.path} holds the tensor {long[0]}: longrope is not supported, so convert a "
      "model with the short context."
    )
  return known


def _read_scaling(source: GGUFSource, head_dim: int, theta: float) -> RopeScaling | None:
  """The scaling with the factors of the file: ours if it has our keys, else Llama 3's."""
  factors = source.rope_factors
  if factors is None or (factors == 1).all():
    return None
  # Llama 3.1, 3.2 and 3.3 differ in the factor only, which the lowest frequency has.
  scaling = RopeScaling(factor=_shortest(factors.reshape(-1)[-1]))
  stored: Metadata = {}
  for field in dataclasses.fields(scaling):
    value = source.metadata.get(_SCALING + field.name)
    if isinstance(value, int | float) and math.isfinite(value):
      stored[field.name] = value if isinstance(value, int) else _shortest(value)
  scaling = dataclasses.replace(scaling, **stored)
  with np.errstate(all="ignore"):
    expected = _factors(head_dim, theta, scaling)
  if factors.shape != expected.shape or not np.allclose(factors, expected, _TOLERANCE, 0):
    raise UserError(
      f"{source.path}: the factors in the tensor rope_freqs.weight are not those of Llama-3 "
      f"scaling by {scaling.factor:g}: other scalings are not supported."
    )
  return scaling


def _factors(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
  plain, scaled = rope.frequencies(head_dim, theta), rope.frequencies(head_dim, theta, scaling)
  return np.asarray(plain / scaled, np.float32)


def _shortest(value: float) -> float:
  """The shortest decimal that is this number in float32: 1e-05 for 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def _brief(value: Any) -> str:
  return f"a list of {len(value)}" if isinstance(value, list) else repr(value)
