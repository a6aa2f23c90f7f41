"""The feed-forward layer of a block.

Stored parameters have a leading axis of layers; `lax.scan` removes it before the layer is called.
Shapes: L layers of a stretch, B batch, S sequence, M model width, F feed-forward width.
"""

import functools
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from kernels.feed_forward import feed_forward
from lwm.config.model import ModelConfig
from lwm.cost.layer import KEPT, Division, LayerCost, dtype_bytes
from lwm.model.lora import num_added
from lwm.model.parameters import residual_std
from lwm.model.projection import Projection, product
from lwm.parallel.sharding import ShardingRules

_GATE = Projection("gate", ("model", "feed_forward"))
_UP = Projection("up", ("model", "feed_forward"))
_DOWN = Projection("down", ("feed_forward", "model"))
_PROJECTIONS = (_GATE, _UP, _DOWN)
_linear = functools.partial(product, "bsi,io->bso")


class FeedForward(nnx.Module):
  """SwiGLU (arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig, num_layers: int, rules: ShardingRules, rngs: nnx.Rngs):
    M, F, std = config.width, config.feed_forward_width, config.initializer_std
    self.rules = rules
    self.chunk = config.feed_forward_chunk
    _GATE.declare(self, config, (M, F), std, num_layers, rngs)
    _UP.declare(self, config, (M, F), std, num_layers, rngs)
    _DOWN.declare(self, config, (F, M), residual_std(config), num_layers, rngs)

  def __call__(self, x_BxSxM: jax.Array) -> jax.Array:
    """The feed-forward of each token, [B, S, M]; the caller adds it to the residual stream."""
    spec = self.rules.spec("batch", "residual", None)
    run = functools.partial(self.local, chunk=self.chunk)
    return jax.shard_map(run, in_specs=(spec, self.specs()), out_specs=spec)(
      x_BxSxM, self.weights(x_BxSxM.dtype)
    )

  def weights(self, dtype: DTypeLike) -> Any:
    """The weights as `local` takes them, a tree of arrays."""
    return tuple(projection.gather(self, dtype) for projection in _PROJECTIONS)

  def specs(self) -> Any:
    """The partitions of `weights`."""
    return tuple(projection.specs(self) for projection in _PROJECTIONS)

  def local(self, x_BxSxM: jax.Array, weights: Any, *, chunk: int) -> jax.Array:
    """The feed-forward of this device's tokens, inside `jax.shard_map`."""
    return feed_forward(
      x_BxSxM,
      *weights,
      chunk=chunk,
      axis_name=self.rules.tensor,
      has_part_of_tokens=self.rules.residual is not None,
      linear=_linear,
    )


def feed_forward_cost(config: ModelConfig, division: Division) -> LayerCost:
  """The cost of one feed-forward layer."""
  M, F, number = config.width, config.feed_forward_width, dtype_bytes(config.compute_dtype)
  added = num_added(config, {"gate": (M, F), "up": (M, F), "down": (F, M)})
  kept = KEPT[config.remat]
  # A sequence longer than one chunk goes through chunk by chunk, and nothing of a chunk is kept.
  in_chunks = division.row_length > config.feed_forward_chunk
  keeps_products = kept.products and not in_chunks
  keeps_input = kept.everything and not in_chunks
  return LayerCost(
    weights=3 * M * F + added,
    flops=6 * M * F + 2 * added,
    # Gate and up; the backward pass does not need the result of the down projection.
    recompute_flops=0 if keeps_products else 4 * M * F,
    kept=(2 * F / division.tensor + M) * number if keeps_products else 0,
    # A gather and a scatter in each direction, and a gather of what is not kept.
    gathered=(4 if keeps_input else 5) * M,
  )
