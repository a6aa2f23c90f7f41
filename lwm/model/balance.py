"""Parameters that follow the loads of experts, without gradients: router biases and mean loads.

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


def mean_after(mean_LxE: jax.Array, load_LxE: jax.Array, decay: float) -> jax.Array:
  """The mean loads after a step: decay x mean load + (1 - decay) x load / (mean over experts).

  Args:
    mean_LxE: before the step.
    load_LxE: choices of each expert in the step.
    decay: `ExpertsConfig.load_decay`.
  """
  relative_LxE = load_LxE / jnp.maximum(jnp.mean(load_LxE, axis=1, keepdims=True), 1e-9)
  return decay * mean_LxE + (1 - decay) * relative_LxE


def rebalanced(config: ModelConfig, frozen: Any, statistics: dict[str, jax.Array]) -> Any:
  """The frozen parameters after a step.

  bias += bias_rate x sign(mean over experts - load), and the mean loads follow `mean_after`.

  Args:
    config: the decoder.
    frozen: parameters that no optimizer changes, as nested dicts. If a router is among them, its
      bias does not change.
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
    new = {}
    if "router_bias" in layer and "router" not in layer:
      mean_Lx1 = jnp.mean(load_LxE, axis=1, keepdims=True)
      new["router_bias"] = layer["router_bias"] + config.experts.bias_rate * jnp.sign(
        mean_Lx1 - load_LxE
      )
    if "expert_load" in layer:
      new["expert_load"] = mean_after(layer["expert_load"], load_LxE, config.experts.load_decay)
    if new:
      frozen = frozen | {name: frozen[name] | {"feed_forward": layer | new}}
  return frozen
