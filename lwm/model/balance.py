"""Balances the loads of experts without a loss (arXiv 2408.15664), as DeepSeek-V3 does.

A router chooses by score + bias. After each step, the biases of experts with more than the mean
load fall, and those of the others rise. No optimizer changes them.

L layers of experts, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lwm.config.model import EXPERTS, ModelConfig
from lwm.model.decoder import stretch_name

# A glob over the names of the biases.
BIASES = "*.router_bias"


def rebalanced(config: ModelConfig, frozen: Any, statistics: dict[str, jax.Array]) -> Any:
  """The frozen parameters after a step: bias += bias_rate x sign(mean load - load).

  Args:
    config: the decoder.
    frozen: parameters that no optimizer changes, as nested dicts. A bias whose router is among them
      stays.
    statistics: of the decoder, over the whole batch.
  """
  first = 0
  for index, stretch in enumerate(config.resolved_stretches):
    if stretch.kind != EXPERTS:
      continue
    assert config.experts is not None
    name, layers = stretch_name(index), slice(first, first + stretch.num_layers)
    first = layers.stop
    layer = frozen.get(name, {}).get("feed_forward", {})
    if "router_bias" not in layer or "router" in layer:
      continue
    load_LxE = jnp.sum(statistics["expert_load"][layers], axis=1)
    direction_LxE = jnp.sign(jnp.mean(load_LxE, axis=1, keepdims=True) - load_LxE)
    bias_LxE = layer["router_bias"] + config.experts.bias_rate * direction_LxE
    stretch_params = frozen[name] | {"feed_forward": layer | {"router_bias": bias_LxE}}
    frozen = frozen | {name: stretch_params}
  return frozen
