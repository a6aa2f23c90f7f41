"""Low-rank additions to projections, merged into them (LoRA, arXiv 2106.09685).

A projection with kernel W computes x W + scale x A B, where A has `rank` outputs and B has `rank`
inputs; lwm/model/projection.py declares and applies A and B.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from lwm.config.model import LoraConfig, ModelConfig

# What the names of A and B add to that of the kernel, and a glob over the names of both.
A, B = "_lora_a", "_lora_b"
ADDED = "*_lora_[ab]"


def num_added(config: ModelConfig, shapes: Mapping[str, tuple[int, int]]) -> int:
  """Elements of A and B in one layer, given (inputs, outputs) of its projections."""
  if config.lora is None:
    return 0
  return sum(config.lora.rank * sum(shapes[name]) for name in config.lora.targets if name in shapes)


def merged(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, lora: LoraConfig) -> np.ndarray:
  """The kernel with the product of A and B added to it, float32.

  Args:
    kernel: [inputs..., outputs...], without the axis of layers.
    a: [inputs..., rank].
    b: [rank, outputs...].
    lora: its scale is used.
  """
  added = np.tensordot(np.asarray(a, np.float32), np.asarray(b, np.float32), 1)
  return np.asarray(kernel, np.float32) + np.float32(lora.scale) * added


def merge(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
  """Parameters of a model with `config.lora` as those of the same model without it.

  The result equals the model with unmerged parameters up to rounding. Arrays that change are
  float32 NumPy arrays.
  """
  assert config.lora is not None
  leaves = traverse_util.flatten_dict(params, sep=".")
  for name in [name for name in leaves if name.endswith(A)]:
    base = name.removesuffix(A)
    a_L, b_L = leaves.pop(name), leaves.pop(base + B)
    layers = zip(leaves[base], a_L, b_L, strict=True)
    leaves[base] = np.stack([merged(kernel, a, b, config.lora) for kernel, a, b in layers])
  return traverse_util.unflatten_dict(leaves, sep=".")
