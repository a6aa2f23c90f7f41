"""One decoder block: attention and feed-forward around the residual stream.

B batch, S sequence, M model width, P = D/2 pairs of a head.
"""

import jax
from flax import nnx

from lwm.config.model import ModelConfig
from lwm.model.attention import Attend, Attention
from lwm.model.feed_forward import FeedForward
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
