"""Low-rank additions to projections, merged into them (LoRA, arXiv 2106.09685).

A projection with kernel W computes x W + scale x A B, where A has `rank` outputs and B has `rank`
inputs; lwm/model/projection.py declares and applies A and B.
"""

from collections.abc import Mapping

import numpy as np

from lwm.config.model import LoraConfig, ModelConfig

# Suffixes of A and B after the name of the kernel, and a glob that matches both.
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
