"""The tensors of a model in GGUF: a table used in both directions.

Linear layers are [out, in], as in Hugging Face's format. The architecture says which pairs of a
head RoPE rotates: `llama` pairs 2i with 2i + 1, so the rows of its queries and keys are
interleaved; the others pair i with i + D/2, as we do.

M model width, H heads, D head_dim, P = D/2 pairs.
"""

import math

import numpy as np

from lwm.config.model import ModelConfig
from lwm.convert.table import (
  FLAT,
  SAME,
  LayerRow,
  Part,
  Shape,
  Tensor,
  Transform,
  layer_rows,
  linear,
)

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"


def _interleave(weight_MxHxD: np.ndarray) -> np.ndarray:
  """[M, H, D] with the pairs (i, i + D/2) to [H * D, M] with the pairs (2i, 2i + 1)."""
  M, H, D = weight_MxHxD.shape
  return weight_MxHxD.reshape(M, H, 2, D // 2).swapaxes(2, 3).reshape(M, H * D).T


def _split(weight_NxM: np.ndarray, shape: Shape) -> np.ndarray:
  """The inverse of `_interleave`; N = H * D."""
  M, H, D = shape
  return weight_NxM.T.reshape(M, H, D // 2, 2).swapaxes(2, 3).reshape(shape)


_INTERLEAVED = Transform(
  their_shape=lambda shape: (math.prod(shape[1:]), shape[0]), to_theirs=_interleave, to_ours=_split
)

_NORMS: list[LayerRow] = [
  ("blk.{layer}.attn_norm.weight", ("attention_norm.scale",), SAME),
  ("blk.{layer}.ffn_norm.weight", ("feed_forward_norm.scale",), SAME),
]
_FEED_FORWARD: list[LayerRow] = [
  ("blk.{layer}.ffn_gate.weight", ("feed_forward.gate",), linear()),
  ("blk.{layer}.ffn_up.weight", ("feed_forward.up",), linear()),
  ("blk.{layer}.ffn_down.weight", ("feed_forward.down",), linear()),
]
_VALUE_AND_OUT: list[LayerRow] = [
  ("blk.{layer}.attn_v.weight", ("attention.value",), linear()),
  ("blk.{layer}.attn_output.weight", ("attention.out",), linear(in_axes=2)),
]
_QUERY_AND_KEY: list[LayerRow] = [
  ("blk.{layer}.attn_q.weight", ("attention.query",), linear()),
  ("blk.{layer}.attn_k.weight", ("attention.key",), linear()),
]

# The tensors of a layer, by `general.architecture`. `llama` is also Mistral.
_LAYERS: dict[str, list[LayerRow]] = {
  "llama": [
    *_NORMS,
    ("blk.{layer}.attn_q.weight", ("attention.query",), _INTERLEAVED),
    ("blk.{layer}.attn_k.weight", ("attention.key",), _INTERLEAVED),
    *_VALUE_AND_OUT,
    *_FEED_FORWARD,
  ],
  "qwen2": [
    *_NORMS,
    *_QUERY_AND_KEY,
    *_VALUE_AND_OUT,
    ("blk.{layer}.attn_q.bias", ("attention.query_bias",), FLAT),
    ("blk.{layer}.attn_k.bias", ("attention.key_bias",), FLAT),
    ("blk.{layer}.attn_v.bias", ("attention.value_bias",), FLAT),
    *_FEED_FORWARD,
  ],
  "qwen3": [
    *_NORMS,
    *_QUERY_AND_KEY,
    ("blk.{layer}.attn_q_norm.weight", ("attention.query_norm.scale",), SAME),
    ("blk.{layer}.attn_k_norm.weight", ("attention.key_norm.scale",), SAME),
    *_VALUE_AND_OUT,
    *_FEED_FORWARD,
  ],
  "phi3": [
    *_NORMS,
    (
      "blk.{layer}.attn_qkv.weight",
      ("attention.query", "attention.key", "attention.value"),
      linear(),
    ),
    ("blk.{layer}.attn_output.weight", ("attention.out",), linear(in_axes=2)),
    ("blk.{layer}.ffn_up.weight", ("feed_forward.gate", "feed_forward.up"), linear()),
    ("blk.{layer}.ffn_down.weight", ("feed_forward.down",), linear()),
  ],
}
ARCHITECTURES = tuple(_LAYERS)


def table(config: ModelConfig, architecture: str) -> list[Tensor]:
  """The rows of a model.

  Args:
    config: of a model that the architecture can express.
    architecture: one of ARCHITECTURES.
  """
  head = [] if config.tied_head else [Tensor(HEAD, (Part("output", linear()),))]
  return [
    Tensor(EMBEDDING, (Part("embedding"),)),
    *layer_rows(config, _LAYERS[architecture]),
    Tensor("output_norm.weight", (Part("norm.scale"),)),
    *head,
  ]
