"""Conversion of parameters from and to Hugging Face's LlamaForCausalLM.

Both codebases rotate the pairs (i, i + D/2) in RoPE, so only names and shapes change: torch stores
linear layers as [out, in], and every layer of the model separately.

M model width, H query heads, G key/value heads, D head_dim, F feed-forward width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lwm.config.model import ModelConfig, RopeScaling
from lwm.errors import UserError

_EMBEDDING = "model.embed_tokens.weight"
_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"
# A block's weights: (our module, our name, their name).
_BLOCK = (
  ("attention_norm", "scale", "input_layernorm"),
  ("attention", "query", "self_attn.q_proj"),
  ("attention", "key", "self_attn.k_proj"),
  ("attention", "value", "self_attn.v_proj"),
  ("attention", "out", "self_attn.o_proj"),
  ("feed_forward_norm", "scale", "post_attention_layernorm"),
  ("feed_forward", "gate", "mlp.gate_proj"),
  ("feed_forward", "up", "mlp.up_proj"),
  ("feed_forward", "down", "mlp.down_proj"),
)


def config_from_hugging_face(config: Mapping) -> tuple[ModelConfig, float]:
  """Converts a `config.json` to a model and its RoPE theta; all ids are text.

  Raises:
    UserError: it is not a Llama, or its RoPE, activation or biases are not supported here.
  """
  if config.get("model_type") != "llama" or config.get("hidden_act", "silu") != "silu":
    raise UserError(
      f"config.json: model_type {config.get('model_type')!r} with hidden_act "
      f"{config.get('hidden_act')!r} is not a Llama with SwiGLU: convert such a model."
    )
  biases = [name for name in ("attention_bias", "mlp_bias") if config.get(name)]
  if biases:
    raise UserError(
      f"config.json: a Llama with {' and '.join(biases)} is not supported: convert one without."
    )
  # transformers 5 writes rope_parameters. Older versions write rope_theta and rope_scaling, and the
  # oldest call its rope_type just type.
  rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
  theta = rope.get("rope_theta", config.get("rope_theta", 1e4))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise UserError(
      f"config.json: rope_type {kind!r} is not supported: convert a model with default or llama3."
    )
  scaling = None
  if kind == "llama3":
    scaling = RopeScaling(
      factor=rope["factor"],
      low_frequency_factor=rope["low_freq_factor"],
      high_frequency_factor=rope["high_freq_factor"],
      original_context=rope["original_max_position_embeddings"],
    )
  heads = config["num_attention_heads"]
  model = ModelConfig(
    num_layers=config["num_hidden_layers"],
    width=config["hidden_size"],
    num_heads=heads,
    num_kv_heads=config.get("num_key_value_heads") or heads,
    head_dim=config.get("head_dim") or config["hidden_size"] // heads,
    feed_forward_width=config["intermediate_size"],
    text_vocab_size=config["vocab_size"],
    norm_epsilon=config["rms_norm_eps"],
    tied_head=config.get("tie_word_embeddings", False),
    rope_scaling=scaling,
  )
  return model, theta


def from_hugging_face(weights: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
  """Converts a state dict to our tree of parameters, as float32 NumPy arrays.

  Raises:
    UserError: a weight is missing, or its shape differs from what `config` makes it.
  """
  shapes = _shapes(config)

  def take(name: str, ours: str) -> np.ndarray:
    if name not in weights:
      raise UserError(f"The Llama state dict lacks {name!r}: give the whole model, unsharded.")
    weight = np.asarray(weights[name], np.float32)
    shape, transposed = shapes[ours]
    expected = transposed[::-1]
    if weight.shape != expected:
      raise UserError(
        f"{name!r} has shape {weight.shape} but the model's settings make it {expected}: "
        "use the settings of the weights' own config.json."
      )
    return weight.T.reshape(shape)

  blocks: dict[str, dict[str, np.ndarray]] = {}
  for module, ours, theirs in _BLOCK:
    layers = [
      take(f"model.layers.{i}.{theirs}.weight", f"{module}.{ours}")
      for i in range(config.num_layers)
    ]
    blocks.setdefault(module, {})[ours] = np.stack(layers)
  params: dict[str, Any] = {
    "embedding": np.ascontiguousarray(take(_EMBEDDING, "output").T),
    "blocks": blocks,
    "norm": {"scale": take(_NORM, "norm.scale")},
  }
  if not config.tied_head:
    params["output"] = take(_HEAD, "output")
  return params


def to_hugging_face(params: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
  """Converts our parameters to a float32 state dict; a tied head has no `lm_head.weight`."""
  shapes = _shapes(config)

  def give(value, ours: str) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(value).reshape(shapes[ours][1]).T)

  weights = {
    _EMBEDDING: np.asarray(params["embedding"]),
    _NORM: np.asarray(params["norm"]["scale"]),
  }
  for module, ours, theirs in _BLOCK:
    stacked = params["blocks"][module][ours]
    for i in range(config.num_layers):
      weights[f"model.layers.{i}.{theirs}.weight"] = give(stacked[i], f"{module}.{ours}")
  if not config.tied_head:
    weights[_HEAD] = give(params["output"], "output")
  return weights


def _shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
  """For each of our weights, without the layer axis: its shape, and torch's shape transposed."""
  M, F, D = config.width, config.feed_forward_width, config.head_dim
  H, G = config.num_heads, config.num_kv_heads
  plain = {
    "attention_norm.scale": (M,),
    "feed_forward_norm.scale": (M,),
    "norm.scale": (M,),
    "feed_forward.gate": (M, F),
    "feed_forward.up": (M, F),
    "feed_forward.down": (F, M),
    # A tied head is the embedding, transposed.
    "output": config.table_shapes["embedding"][::-1],
  }
  return {name: (shape, shape) for name, shape in plain.items()} | {
    "attention.query": ((M, H, D), (M, H * D)),
    "attention.key": ((M, G, D), (M, G * D)),
    "attention.value": ((M, G, D), (M, G * D)),
    "attention.out": ((H, D, M), (H * D, M)),
  }
