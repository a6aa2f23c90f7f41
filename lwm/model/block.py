"""The kinds of decoder blocks: layers around the residual stream.

A kind is an NNX module with the constructor, the call and the `cost` of `Block`. To add one, write
its layers in a file of their own and enter it in KINDS; `ModelConfig.stretches` then names it.

B batch, S sequence, M model width, P = D/2 pairs of a head.
"""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from kernels.experts.slots import Slots
from lwm.config.model import EXPERTS, ModelConfig
from lwm.cost.layer import Division, LayerCost, dtype_bytes, total
from lwm.model import extras as extras_lib
from lwm.model.adapter import Adapter, Prompt, adapter_cost
from lwm.model.attention import Attend, Attention, attention_cost
from lwm.model.experts import Experts, experts_cost
from lwm.model.extras import Extras
from lwm.model.feed_forward import FeedForward, feed_forward_cost
from lwm.model.parameters import RMSNorm
from lwm.parallel.sharding import ShardingRules


class Block(nnx.Module):
  """Pre-norm attention and feed-forward, each added to the residual stream.

  With `config.adapter`, adapters change the normalised input of attention.
  """

  # The feed-forward layer's constructor and cost; a subclass may have others.
  _make_feed_forward: ClassVar[Any] = FeedForward
  _feed_forward_cost: ClassVar[Any] = staticmethod(feed_forward_cost)

  def __init__(self, config: ModelConfig, num_layers: int, rules: ShardingRules, rngs: nnx.Rngs):
    """Declares the parameters of a stretch of `num_layers` blocks, stacked along the first axis."""
    self.attention_norm = RMSNorm(config, (num_layers,))
    self.attention = Attention(config, num_layers, rules, rngs)
    self.feed_forward_norm = RMSNorm(config, (num_layers,))
    self.feed_forward = self._make_feed_forward(config, num_layers, rules, rngs)
    adapter = config.adapter
    self.adapter = Adapter(adapter, config.width, num_layers, rules, rngs) if adapter else None

  def __call__(
    self,
    x_BxSxM: jax.Array,
    cosine_BxSxP: jax.Array,
    sine_BxSxP: jax.Array,
    attend: Attend,
    head_groups: int = 1,
    prompt: Prompt | None = None,
    modality_BxS: jax.Array | None = None,
    slots: Slots | None = None,
  ) -> tuple[jax.Array, Any, Extras]:
    """One layer of the stretch; its parameters have no axis of layers here.

    `modality_BxS` and `slots` are as `lwm.model.experts.Experts` takes them. Dense layers treat
    all tokens alike.

    Returns:
      The residual stream after the block, [B, S, M]; what `attend` carries on; and the extras.
    """
    input_BxSxM = self.attention_norm(x_BxSxM)
    if self.adapter is not None:
      assert prompt is not None
      input_BxSxM = self.adapter(input_BxSxM, prompt)
    mixed_BxSxM, carried = self.attention(
      input_BxSxM, cosine_BxSxP, sine_BxSxP, attend, head_groups
    )
    x_BxSxM += mixed_BxSxM
    out_BxSxM, extras = self._feed_forward(self.feed_forward_norm(x_BxSxM), modality_BxS, slots)
    return x_BxSxM + out_BxSxM, carried, extras

  def expert_slots(self) -> Slots | None:
    """See `lwm.model.experts.Experts.slots`."""
    return None

  def _feed_forward(
    self, x_BxSxM: jax.Array, modality_BxS: jax.Array | None, slots: Slots | None
  ) -> tuple[jax.Array, Extras]:
    return self.feed_forward(x_BxSxM), extras_lib.nothing()

  @classmethod
  def cost(cls, config: ModelConfig, division: Division) -> LayerCost:
    """The cost of one block without its norms. Every remat policy keeps the input of the block."""
    costs = (attention_cost, cls._feed_forward_cost, adapter_cost)
    parts = [cost(config, division) for cost in costs]
    block_input = config.width * dtype_bytes(config.compute_dtype) / division.tensor
    layers = total((part, 1) for part in parts)
    # About twelve reads and writes of [tokens, width] in a forward pass: norms, residuals, the
    # inputs and results of products.
    return dataclasses.replace(
      layers, kept=block_input + layers.kept, moved=layers.moved + 12 * config.width
    )


class ExpertBlock(Block):
  """A block whose feed-forward network is a mixture of experts."""

  _make_feed_forward = Experts
  _feed_forward_cost = staticmethod(experts_cost)

  def expert_slots(self) -> Slots | None:
    return self.feed_forward.slots()

  def _feed_forward(
    self, x_BxSxM: jax.Array, modality_BxS: jax.Array | None, slots: Slots | None
  ) -> tuple[jax.Array, Extras]:
    return self.feed_forward(x_BxSxM, modality_BxS, slots)


# Kinds of layers by the name that `Stretch.kind` gives them.
KINDS: dict[str, type[Block]] = {"dense": Block, EXPERTS: ExpertBlock}
