"""The feed-forward layer of a block.

Stored parameters have a leading axis of layers; `lax.scan` removes it before the layer is called.
Shapes: L layers of a stretch, B batch, S sequence, M model width, F feed-forward width.
"""

import functools

import jax
from flax import nnx

from kernels.feed_forward import feed_forward
from lwm.config.model import ModelConfig
from lwm.cost.layer import KEPT, Division, LayerCost, dtype_bytes
from lwm.model.parameters import matrix, residual_std
from lwm.parallel.sharding import ShardingRules


class FeedForward(nnx.Module):
  """SwiGLU (arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig, num_layers: int, rules: ShardingRules, rngs: nnx.Rngs):
    L, M, F = num_layers, config.width, config.feed_forward_width
    std = config.initializer_std
    self.rules = rules
    self.chunk = config.feed_forward_chunk
    declare = functools.partial(matrix, rngs, rules)
    self.gate = declare((L, M, F), ("layers", "model", "feed_forward"), std)
    self.up = declare((L, M, F), ("layers", "model", "feed_forward"), std)
    self.down = declare((L, F, M), ("layers", "feed_forward", "model"), residual_std(config))

  def __call__(self, x_BxSxM: jax.Array) -> jax.Array:
    """The feed-forward of each token, [B, S, M]; the caller adds it to the residual stream."""
    wide, narrow = ("model", "feed_forward"), ("feed_forward", "model")
    spec = self.rules.spec("batch", "residual", None)
    run = jax.shard_map(
      functools.partial(
        feed_forward,
        chunk=self.chunk,
        axis_name=self.rules.tensor,
        has_part_of_tokens=self.rules.residual is not None,
      ),
      in_specs=(spec, *(self.rules.gathered(*axes) for axes in (wide, wide, narrow))),
      out_specs=spec,
    )
    return run(
      x_BxSxM,
      self.rules.gather(self.gate[...], x_BxSxM.dtype, *wide),
      self.rules.gather(self.up[...], x_BxSxM.dtype, *wide),
      self.rules.gather(self.down[...], x_BxSxM.dtype, *narrow),
    )


def feed_forward_cost(config: ModelConfig, division: Division) -> LayerCost:
  """The cost of one feed-forward layer."""
  M, F, number = config.width, config.feed_forward_width, dtype_bytes(config.compute_dtype)
  kept = KEPT[config.remat]
  # A sequence longer than one chunk goes through chunk by chunk, and nothing of a chunk is kept.
  in_chunks = division.row_length > config.feed_forward_chunk
  keeps_products = kept.products and not in_chunks
  keeps_input = kept.everything and not in_chunks
  return LayerCost(
    weights=3 * M * F,
    flops=6 * M * F,
    # Gate and up; the backward pass does not need the result of the down projection.
    recompute_flops=0 if keeps_products else 4 * M * F,
    kept=(2 * F / division.tensor + M) * number if keeps_products else 0,
    # A gather and a scatter in each direction, and a gather of what is not kept.
    gathered=(4 if keeps_input else 5) * M,
  )
