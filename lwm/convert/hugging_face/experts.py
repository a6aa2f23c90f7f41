"""The experts of Mixtral and Qwen3-MoE in config.json, and back.

Both choose by the softmax over all experts. They differ in the names of the settings, and only
Qwen3-MoE has dense layers between those with experts, and shares that need not sum to 1.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from lwm.config.model import EXPERTS, ExpertsConfig, ModelConfig, Stretch, stretches_of
from lwm.convert.hugging_face.names import MIXTRAL, Architecture
from lwm.errors import UserError

# Their names for: number of experts, experts per token, width of an expert. transformers before
# version 5 calls the first one `num_experts` in Qwen3-MoE.
_MIXTRAL = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
_QWEN3_MOE = ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
_OLD_NUM_EXPERTS = "num_experts"


def read_experts(
  path: pathlib.Path, settings: Mapping[str, Any], architecture: Architecture
) -> tuple[ExpertsConfig | None, list[Stretch]]:
  """The experts of a model and its stretches; (None, []) for a dense class.

  Args:
    path: of config.json, for messages.
    settings: its content, and the defaults of the class.
    architecture: the class.

  Raises:
    UserError: a setting is missing or wrong.
  """
  if not architecture.experts:
    return None, []
  is_mixtral = architecture == MIXTRAL
  names = _MIXTRAL if is_mixtral else _QWEN3_MOE
  sizes = []
  for name in names:
    size = settings.get(name)
    if name == names[0] and size is None:
      size = settings.get(_OLD_NUM_EXPERTS)
    if type(size) is not int or size < 1:
      raise UserError(f"{path}: {name} must be a positive integer: get the file again.")
    sizes.append(size)
  if sizes[1] > sizes[0]:
    raise UserError(f"{path}: {names[1]} is more than {names[0]}: get the file again.")
  experts = ExpertsConfig(num_experts=sizes[0], experts_per_token=sizes[1], width=sizes[2])
  if is_mixtral:
    return experts, []
  experts.renormalise = bool(settings["norm_topk_prob"])
  dense, every = settings["mlp_only_layers"] or [], settings["decoder_sparse_step"]
  if not isinstance(dense, list) or type(every) is not int or every < 1:
    raise UserError(
      f"{path}: mlp_only_layers={dense!r} and decoder_sparse_step={every!r} must be a list and a "
      "positive integer: get the file again."
    )
  layers = range(settings["num_hidden_layers"])
  has_experts = [layer not in dense and (layer + 1) % every == 0 for layer in layers]
  return experts, [] if all(has_experts) else stretches_of(has_experts)


def experts_problem(config: ModelConfig) -> str | None:
  """What no class computes of a model with experts, or None."""
  experts = config.experts
  assert experts is not None
  if experts.router != "softmax" or experts.shared_experts or experts.scale != 1:
    return "a sigmoid router, shared experts or scaled shares"
  if config.attention_bias:
    return "experts and attention_bias together"
  if not config.query_key_norm and (
    not experts.renormalise or any(s.kind != EXPERTS for s in config.resolved_stretches)
  ):
    return "dense layers or shares that do not sum to 1 without query_key_norm"
  return None


def write_experts(config: ModelConfig) -> dict[str, Any]:
  """The settings of the experts in config.json; none for a dense model."""
  experts = config.experts
  if experts is None:
    return {}
  sizes = experts.num_experts, experts.experts_per_token, experts.width
  if not config.query_key_norm:
    return dict(zip(_MIXTRAL, sizes))
  kinds = [s.kind for s in config.resolved_stretches for _ in range(s.num_layers)]
  return dict(zip(_QWEN3_MOE, sizes)) | {
    _OLD_NUM_EXPERTS: experts.num_experts,
    "norm_topk_prob": experts.renormalise,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [layer for layer, kind in enumerate(kinds) if kind != EXPERTS],
  }
