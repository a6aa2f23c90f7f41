"""One decoder block: attention and feed-forward around the residual stream.

B batch, S sequence, M model width, P = D/2 pairs of a head.
"""

import dataclasses

import jax
from flax import nnx

from lwm.config.model import ModelConfig
from lwm.cost.layer import Division, LayerCost, dtype_bytes, total
from lwm.model.attention import Attend, Attention, attention_cost
from lwm.model.feed_forward import FeedForward, feed_forward_cost
from lwm.model.parameters import RMSNorm
from lwm.parallel.sharding import ShardingRules


class Block(nnx.Module):
  """Pre-norm attention and feed-forward, each added to the residual stream."""

  def __init__(self, config: ModelConfig, rules: ShardingRules, rngs: nnx.Rngs):
    stack = (config.num_layers,)
    self.attention_norm = RMSNorm(config, stack)
    self.attention = Attention(config, rules, rngs)
    self.feed_forward_norm = RMSNorm(config, stack)
    self.feed_forward = FeedForward(config, rules, rngs)

  def __call__(self, x_BxSxM: jax.Array, cosine_BxSxP, sine_BxSxP, attend: Attend, head_groups=1):
    """The residual stream after the block, [B, S, M], and whatever `attend` carries."""
    mixed_BxSxM, carried = self.attention(
      self.attention_norm(x_BxSxM), cosine_BxSxP, sine_BxSxP, attend, head_groups
    )
    x_BxSxM += mixed_BxSxM
    return x_BxSxM + self.feed_forward(self.feed_forward_norm(x_BxSxM)), carried


def block_cost(config: ModelConfig, division: Division) -> LayerCost:
  """The cost of one block, whose input is kept under every remat policy. Norms are not counted."""
  parts = total([(attention_cost(config, division), 1), (feed_forward_cost(config, division), 1)])
  block_input = config.width * dtype_bytes(config.compute_dtype) / division.tensor
  # About twelve reads and writes of [tokens, width] in a forward pass: norms, residuals, the inputs
  # and results of products.
  return dataclasses.replace(parts, kept=block_input + parts.kept, moved=12 * config.width)
