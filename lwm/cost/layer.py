"""What a layer costs: MFU, the planner and the memory bound know layers by this only.

Beside the definition of each layer, a function fills a `LayerCost` from the configuration and a
`Division`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from lwm.config.experiment import Stage
from lwm.parallel.sharding import ShardingRules


@dataclasses.dataclass(frozen=True)
class Kept:
  """What a remat policy keeps of a block beside its input; the backward pass computes the rest."""

  attention: bool = False  # The result of attention and its log-sum-exp.
  products: bool = False  # The results of matrix products.
  everything: bool = False  # All arrays, gathered weights included.
  on_host: bool = False  # The block's input and the arrays above are kept in the host's memory.


# By `ModelConfig.remat`; lwm/model/decoder.py applies them.
KEPT = {
  "none": Kept(attention=True, products=True, everything=True),
  "dots": Kept(attention=True, products=True),
  "attention": Kept(attention=True),
  "full": Kept(),
  "offload": Kept(on_host=True),
  "offload_attention": Kept(attention=True, on_host=True),
}


@dataclasses.dataclass(frozen=True)
class Division:
  """How a mesh divides a step. The default is one device with one token.

  Attributes:
    tokens: tokens per device and step in attention and feed-forward.
    row_length: how many of these tokens belong to one row.
    storage: number of shards in which the parameters of one tensor shard are stored.
    tensor: devices that have the same tokens and divide heads, widths and vocabularies.
    ring: devices in a ring.
    ulysses: neighbours that exchange heads for tokens.
    experts: devices that divide the experts of a layer.
    divides_experts: whether `tensor` divides experts rather than their widths.
  """

  tokens: float = 1
  row_length: int = 1
  storage: int = 1
  tensor: int = 1
  ring: int = 1
  ulysses: int = 1
  experts: int = 1
  divides_experts: bool = False

  @classmethod
  def of(cls, stage: Stage, sizes: Mapping[str, int]) -> "Division":
    """The division of a stage's step over mesh axes of these sizes."""
    rules = ShardingRules()
    ring, ulysses = sizes[rules.ring], sizes[rules.ulysses]
    return cls(
      tokens=stage.tokens_per_batch / math.prod(sizes[axis] for axis in rules.token_axes),
      row_length=stage.sequence_length // (ring * ulysses),
      storage=math.prod(sizes[axis] for axis in rules.model),
      tensor=sizes[rules.tensor],
      ring=ring,
      ulysses=ulysses,
      experts=math.prod(sizes[axis] for axis in rules.experts),
      divides_experts=rules.expert_feed_forward is None,
    )

  @property
  def of_experts(self) -> int:
    """Number of parts of the weights of all experts, of which a device uses one."""
    return self.experts if self.divides_experts else self.experts * self.tensor


@dataclasses.dataclass(frozen=True)
class LayerCost:
  """The cost of one layer or of several, under the configuration's remat policy.

  Attributes:
    weights: elements of the matrices, on all devices together.
    expert_weights: how many of these belong to experts, which devices divide.
    spare_weights: elements of the copies of experts on a device, before `tensor` divides them.
    flops: forward FLOPs of matrix products per token.
    expert_flops: how many of these are computed by the experts that a router chooses.
    pair_flops: forward FLOPs per (query, key) pair.
    recompute_flops: FLOPs per token that the backward pass computes again.
    expert_recompute_flops: how many of these are computed by the experts that a router chooses.
    recompute_pair_flops: FLOPs per pair that the backward pass computes again.
    kept: bytes per token of a device that the forward pass keeps for the backward pass.
    backward: bytes per token of a device that exist at one moment of the backward pass at least,
      beside `kept`.
    moved: elements per token of a device that a forward pass reads and writes.
    hop: elements per token of a device that a hop of the ring sends: keys and values.
    exchanged: elements per token of a device that a step exchanges, heads for tokens.
    gathered: elements per token of a device that a step gathers or scatters over `tensor`.
    dispatched: elements per token that a step sends to experts, or that come back, if all of them
      are on other devices.
  """

  weights: int = 0
  expert_weights: int = 0
  spare_weights: int = 0
  flops: int = 0
  expert_flops: int = 0
  pair_flops: int = 0
  recompute_flops: int = 0
  expert_recompute_flops: int = 0
  recompute_pair_flops: int = 0
  kept: float = 0
  backward: float = 0
  moved: int = 0
  hop: int = 0
  exchanged: int = 0
  gathered: int = 0
  dispatched: int = 0


def weights_in_use(cost: LayerCost, division: Division) -> float:
  """Elements of the gathered weights that a device uses."""
  dense = cost.weights - cost.expert_weights
  return dense / division.tensor + sum(experts_in_use(cost, division))


def experts_in_use(cost: LayerCost, division: Division) -> tuple[float, float]:
  """Elements of the gathered weights of experts that a device uses: its own, and copies."""
  tensor = 1 if division.divides_experts else division.tensor
  return cost.expert_weights / division.of_experts, cost.spare_weights / tensor


def total(layers: Iterable[tuple[LayerCost, int]]) -> LayerCost:
  """The cost of layers that run in turn, from pairs (cost of one layer, number of such layers).

  All fields are sums, except `backward`: it is the maximum, because only one layer at a time is in
  its backward pass.
  """
  layers = list(layers)
  sums = {
    field.name: sum(count * getattr(cost, field.name) for cost, count in layers)
    for field in dataclasses.fields(LayerCost)
  }
  return LayerCost(**sums | {"backward": max(cost.backward for cost, _ in layers)})


def dtype_bytes(name: str) -> int:
  """Bytes per number of a dtype."""
  return jnp.dtype(name).itemsize


# Parameters, gradients, log-sum-exps, and the partial gradients that travel around the ring.
FLOAT32_BYTES = dtype_bytes("float32")
