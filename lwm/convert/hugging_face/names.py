"""Names of the tensors in Hugging Face's directories, for classes of models that are like Llama.

Both codebases rotate the pairs (i, i + D/2) in RoPE, so only names and shapes change.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lwm.config.model import ModelConfig
from lwm.convert.table import FLAT, SAME, LayerRow, Part, Tensor, layer_rows, linear

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# A table of RoPE that old versions stored; it follows from the settings.
INVERSE_FREQUENCIES = "rotary_emb.inv_freq"

# Their name after "model.layers.N.", our names in the block, and the transform.
_EVERY_LAYER: list[LayerRow] = [
  ("input_layernorm.weight", ("attention_norm.scale",), SAME),
  ("self_attn.o_proj.weight", ("attention.out",), linear(in_axes=2)),
  ("post_attention_layernorm.weight", ("feed_forward_norm.scale",), SAME),
]
_SEPARATE: list[LayerRow] = [
  ("self_attn.q_proj.weight", ("attention.query",), linear()),
  ("self_attn.k_proj.weight", ("attention.key",), linear()),
  ("self_attn.v_proj.weight", ("attention.value",), linear()),
]
_FUSED: list[LayerRow] = [
  ("self_attn.qkv_proj.weight", ("attention.query", "attention.key", "attention.value"), linear())
]
_DENSE: list[LayerRow] = [
  ("mlp.down_proj.weight", ("feed_forward.down",), linear()),
  ("mlp.gate_proj.weight", ("feed_forward.gate",), linear()),
  ("mlp.up_proj.weight", ("feed_forward.up",), linear()),
]
_FUSED_DENSE: list[LayerRow] = [
  ("mlp.down_proj.weight", ("feed_forward.down",), linear()),
  ("mlp.gate_up_proj.weight", ("feed_forward.gate", "feed_forward.up"), linear()),
]
_MIXTRAL: list[LayerRow] = [
  ("block_sparse_moe.gate.weight", ("feed_forward.router",), linear()),
  ("block_sparse_moe.experts.{expert}.w1.weight", ("feed_forward.expert_gate",), linear()),
  ("block_sparse_moe.experts.{expert}.w3.weight", ("feed_forward.expert_up",), linear()),
  ("block_sparse_moe.experts.{expert}.w2.weight", ("feed_forward.expert_down",), linear()),
]
_QWEN3_MOE: list[LayerRow] = [
  ("mlp.gate.weight", ("feed_forward.router",), linear()),
  ("mlp.experts.{expert}.gate_proj.weight", ("feed_forward.expert_gate",), linear()),
  ("mlp.experts.{expert}.up_proj.weight", ("feed_forward.expert_up",), linear()),
  ("mlp.experts.{expert}.down_proj.weight", ("feed_forward.expert_down",), linear()),
]
_BIASES: list[LayerRow] = [
  ("self_attn.q_proj.bias", ("attention.query_bias",), FLAT),
  ("self_attn.k_proj.bias", ("attention.key_bias",), FLAT),
  ("self_attn.v_proj.bias", ("attention.value_bias",), FLAT),
]
_QUERY_KEY_NORMS: list[LayerRow] = [
  ("self_attn.q_norm.weight", ("attention.query_norm.scale",), SAME),
  ("self_attn.k_norm.weight", ("attention.key_norm.scale",), SAME),
]


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A class of models.

  Attributes:
    model_type: its name in config.json.
    class_name: in transformers.
    defaults: values that the class gives to settings that config.json lacks, where they are not
      those of Llama.
    attention_bias: queries, keys and values have biases.
    query_key_norm: queries and keys are normalised.
    fused: projections with the same input are one tensor.
    window: whether `sliding_window` means anything: not ("no"), for all layers ("all"), or for the
      layers that `use_sliding_window`, `max_window_layers` and `layer_types` name ("named").
    experts: rows of the feed-forward network of layers with experts.
  """

  model_type: str
  class_name: str
  defaults: Mapping[str, Any]
  attention_bias: bool = False
  query_key_norm: bool = False
  fused: bool = False
  window: str = "no"
  experts: Sequence[LayerRow] = ()


LLAMA = Architecture("llama", "LlamaForCausalLM", {"max_position_embeddings": 2048})
MISTRAL = Architecture(
  "mistral",
  "MistralForCausalLM",
  {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
  window="all",
)
PHI3 = Architecture(
  "phi3",
  "Phi3ForCausalLM",
  {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
  fused=True,
  window="all",
)
_QWEN = {
  "num_key_value_heads": 32,
  "max_position_embeddings": 32768,
  "sliding_window": 4096,
  "max_window_layers": 28,
}
QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", _QWEN, attention_bias=True, window="named")
QWEN3 = Architecture(
  "qwen3", "Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, query_key_norm=True, window="named"
)
MIXTRAL = Architecture(
  "mixtral",
  "MixtralForCausalLM",
  {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 131072,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
  },
  window="all",
  experts=_MIXTRAL,
)
QWEN3_MOE = Architecture(
  "qwen3_moe",
  "Qwen3MoeForCausalLM",
  {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
  },
  query_key_norm=True,
  window="named",
  experts=_QWEN3_MOE,
)
# Not in transformers: its models bring their own code, which has Llama's names and computation.
XVERSE = Architecture("xverse", "XverseForCausalLM", {"max_position_embeddings": 8192})
ARCHITECTURES = {
  architecture.model_type: architecture
  for architecture in (LLAMA, MISTRAL, PHI3, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, XVERSE)
}


def table(architecture: Architecture, config: ModelConfig) -> list[Tensor]:
  """The table of a model of this architecture, whose settings are `config`."""
  rows = _EVERY_LAYER + (_FUSED if architecture.fused else _SEPARATE)
  if config.attention_bias:
    rows += _BIASES
  if config.query_key_norm:
    rows += _QUERY_KEY_NORMS
  dense = _FUSED_DENSE if architecture.fused else _DENSE
  head = [] if config.tied_head else [Tensor(HEAD, (Part("output", linear()),))]
  return [
    Tensor(EMBEDDING, (Part("embedding"),)),
    *layer_rows(config, *(_named(rows + list(own)) for own in (dense, architecture.experts))),
    Tensor("model.norm.weight", (Part("norm.scale"),)),
    *head,
  ]


def _named(rows: list[LayerRow]) -> list[LayerRow]:
  return [(f"model.layers.{{layer}}.{name}", ours, transform) for name, ours, transform in rows]
