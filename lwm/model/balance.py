"""What follows the loads of experts without an optimizer: biases of routers, and mean loads.

Biases balance the loads without a loss (arXiv 2408.15664), as in DeepSeek-V3: a router chooses by
score + bias. After each step, the biases of experts with more than the mean load fall, and those of
the others rise. Mean loads decide where experts are computed (lwm/model/placement.py).

L layers of experts, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lwm.config.model import EXPERTS, ModelConfig
from lwm.model.decoder import stretch_name

# Globs over the names of these parameters.
FOLLOWERS = ("*.router_bias", "*.expert_load")


def rebalanced(config: ModelConfig, frozen: Any, statistics: dict[str, jax.Array]) -> Any:
  """The frozen parameters after a step.

  bias += bias_rate x sign(mean load - load), and the mean load becomes load_decay x mean load +
  (1 - load_decay) x load / (mean over experts).

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
    load_LxE = jnp.sum(statistics["expert_load"][layers], axis=1)
    mean_Lx1 = jnp.mean(load_LxE, axis=1, keepdims=True)
    new = {}
    if "router_bias" in layer and "router" not in layer:
      new["router_bias"] = layer["router_bias"] + config.experts.bias_rate * jnp.sign(
        mean_Lx1 - load_LxE
      )
    if "expert_load" in layer:
      decay, relative_LxE = config.experts.load_decay, load_LxE / jnp.maximum(mean_Lx1, 1e-9)
      new["expert_load"] = decay * layer["expert_load"] + (1 - decay) * relative_LxE
    if new:
      frozen = frozen | {name: frozen[name] | {"feed_forward": layer | new}}
  return frozen
