"""How long a train step should take: FLOPs, bytes and wires against what the devices can do.

XLA's cost analysis counts the body of a loop once, so the FLOPs and bytes here are computed from
the configuration. The assumptions are part of the answer: `Roofline.assumptions`.
"""

import dataclasses
from collections.abc import Sequence

import jax

from lwm.config.experiment import Experiment, Stage
from lwm.config.model import ModelConfig
from lwm.cost.chips import Chip
from lwm.cost.layer import FLOAT32_BYTES, KEPT, Division, LayerCost, dtype_bytes, weights_in_use
from lwm.model.flops import body_cost, layers, train_flops, vocabulary_weights
from lwm.parallel.sharding import ShardingRules
from lwm.plan.topology import Topology
from lwm.plan.traffic import Traffic, moment_bytes, step_traffic
from lwm.program.trainable import trained_shares

# Share of the peak that large matrix products reach, and that attention kernels reach.
MATMUL_EFFICIENCY = 0.75
ATTENTION_EFFICIENCY = 0.55
# Bytes per parameter that an update moves: the parameter and its gradient, each read and written.
UPDATE_BYTES = 4 * FLOAT32_BYTES


@dataclasses.dataclass(frozen=True)
class Hop:
  """One hop of the ring in one layer, in seconds: transfer of the next keys during computation."""

  forward_compute: float
  forward_transfer: float
  backward_compute: float
  backward_transfer: float

  @property
  def hides(self) -> bool:
    return (
      self.forward_transfer <= self.forward_compute
      and self.backward_transfer <= self.backward_compute
    )


@dataclasses.dataclass(frozen=True)
class Roofline:
  """An estimate of one step.

  Attributes:
    model_flops: FLOPs of the whole step as MFU counts them (lwm/model/flops.py).
    recompute_flops: FLOPs beyond those: remat, and scores and logits in backward passes.
    traffic: bytes over each mesh axis.
    seconds: parts of the step by name, without what is hidden behind other parts.
    step_seconds: the sum of `seconds`.
    unit: what a batch consists of, tokens or frames.
    rate_per_chip: all of these in a batch, per second and chip.
    mfu: model FLOPs over the peak of all devices.
    hop: one hop of the ring; None without a ring.
    assumptions: sentences that say what else the figures rest on.
    expert_seconds: the part of `step_seconds` that is proportional to the load of the device whose
      experts have the most tokens. If that load is I times the mean, a step takes (I - 1) x
      expert_seconds longer.
  """

  model_flops: float
  recompute_flops: float
  traffic: tuple[Traffic, ...]
  seconds: dict[str, float]
  step_seconds: float
  unit: str
  rate_per_chip: float
  mfu: float
  hop: Hop | None
  assumptions: tuple[str, ...]
  expert_seconds: float = 0.0


def estimate(
  experiment: Experiment, stage: Stage, mesh: jax.sharding.Mesh, topology: Topology
) -> Roofline:
  """Estimates a step of `stage` on `mesh`, a mesh of the topology's devices."""
  model, rules, chip = experiment.model, ShardingRules(), topology.chip
  division = Division.of(stage, mesh.shape)
  cost, tokens = body_cost(model, division), stage.tokens_per_batch
  # Every row is one document: no stage has more work.
  pairs = stage.rows_per_batch * attended_pairs(model, stage.sequence_length)
  softmax_range = experiment.loss.softmax_range
  trained = trained_shares(experiment, stage)
  head = train_flops(model, text_targets=tokens, softmax_range=softmax_range, trained=trained)
  attention = train_flops(model, attended_pairs=pairs)
  flops = train_flops(model, tokens=tokens, trained=trained) + head + attention
  attention_again = cost.recompute_pair_flops * pairs
  # The backward pass of the head computes the logits again.
  head_again = head / (2 + trained.tables)
  recompute = cost.recompute_flops * tokens + head_again + attention_again

  per_second = mesh.size * chip.flops
  # Contiguous: the last of n shards has n - 1/2 blocks of work, the mean shard n/2.
  imbalance = 2 - 1 / division.ring if stage.layout == "contiguous" else 1.0
  attention_seconds = (
    imbalance * (attention + attention_again) / (per_second * ATTENTION_EFFICIENCY)
  )
  products = flops - attention + recompute - attention_again
  compute = products / (per_second * MATMUL_EFFICIENCY) + attention_seconds
  memory = _memory_bytes(experiment, stage, cost, division) / chip.memory_bandwidth
  traffic = step_traffic(experiment, stage, mesh, topology)

  def wires(*what: str) -> float:
    return sum(part.seconds for part in traffic if part.what in what)

  weights = wires("weights", "gradients", "tables", "gradients of tables", "copies of experts")
  keys, kept = wires("keys and values"), wires("activations kept")
  busy = max(compute, memory)
  seconds = {
    "compute": compute,
    "memory beyond compute": max(0.0, memory - compute),
    f"activations over {rules.tensor}": wires("activations"),
    f"heads over {rules.ulysses}": wires("heads"),
    "tokens to experts and back": wires("tokens to experts"),
    "weights and gradients, what compute does not hide": max(0.0, weights - busy),
    "keys and values, what attention does not hide": max(0.0, keys - attention_seconds),
    "activations to the host and back, what compute does not hide": max(0.0, kept - busy),
    "moments from the host and back": wires("moments"),
  }
  step = sum(seconds.values())
  expert_flops = (2 + trained.body) * cost.expert_flops + cost.expert_recompute_flops
  expert_seconds = expert_flops * tokens / (per_second * MATMUL_EFFICIENCY)
  if model.experts and model.experts.experts_per_token < division.experts:
    # Otherwise each device gathers all tokens, whichever experts they choose.
    expert_seconds += wires("tokens to experts")
  return Roofline(
    model_flops=flops,
    recompute_flops=recompute,
    traffic=tuple(traffic),
    seconds=seconds,
    step_seconds=step,
    unit="tokens",
    rate_per_chip=tokens / step / (mesh.size / chip.devices_per_chip),
    mfu=flops / step / per_second,
    hop=_hop(model, division, traffic, pairs / mesh.size, chip.flops * ATTENTION_EFFICIENCY),
    assumptions=_assumptions(chip, model),
    expert_seconds=expert_seconds,
  )


def attended_pairs(model: ModelConfig, length: int) -> float:
  """(query, key) pairs of a document of this length inside the causal mask and the window."""
  window = min(model.sliding_window or length, length)
  return length * window - window * (window - 1) / 2


def machine_text(chip: Chip) -> str:
  """Peak and bandwidths of a chip as a sentence."""
  network = "" if chip.is_tpu else f", network {chip.network_bandwidth / 1e9:g} GB/s per device"
  return (
    f"{chip.name}: {chip.flops / 1e12:.3g} TFLOP/s, memory {chip.memory_bandwidth / 1e9:g} GB/s, "
    f"links {chip.link_bandwidth / 1e9:g} GB/s one way{network}, "
    f"to the host {chip.host_bandwidth / 1e9:g} GB/s."
  )


def _assumptions(chip: Chip, model: ModelConfig) -> tuple[str, ...]:
  return (
    machine_text(chip),
    f"Matrix products reach {MATMUL_EFFICIENCY:.0%} of the peak, attention "
    f"{ATTENTION_EFFICIENCY:.0%} (its backward pass: seven products, four of them the model's).",
    "Every row is one document, and every token a target over the text ids: no batch is more work.",
    "Weights, gradients and offloaded activations travel during any computation, keys and values "
    f"during attention, activations over {ShardingRules.tensor}, tokens to experts and offloaded "
    "moments during none.",
    *(("All devices have equally many tokens for their experts.",) if model.experts else ()),
  )


def _memory_bytes(
  experiment: Experiment, stage: Stage, cost: LayerCost, division: Division
) -> float:
  """Bytes that a device reads and writes in a step, roughly."""
  model, number = experiment.model, dtype_bytes(experiment.model.compute_dtype)
  tables, shares = vocabulary_weights(model), trained_shares(experiment, stage)
  trained = shares.body * cost.weights + shares.tables * tables
  shard = trained / division.tensor / division.storage
  update = UPDATE_BYTES + 2 * moment_bytes(experiment.optimizer)
  # All parameters are gathered: their weights are written and read in each of three passes.
  in_use = weights_in_use(cost, division) + tables / division.tensor
  weights = 6 * number * in_use * stage.accumulation_steps
  # A backward pass moves twice as much as a forward pass.
  passes = 3 if KEPT[model.remat].everything else 4
  return update * shard + weights + passes * cost.moved * division.tokens * number


def _hop(
  model: ModelConfig, division: Division, traffic: Sequence[Traffic], pairs: float, flops: float
) -> Hop | None:
  """One hop in the first layer. `pairs` and attention's FLOP/s, `flops`, are per device."""
  if division.ring == 1:
    return None
  cost, _ = next(layers(model, division))
  keys = next(part for part in traffic if part.what == "keys and values")
  number = dtype_bytes(model.compute_dtype)
  forward = cost.pair_flops * pairs / division.ring / flops
  elements = division.tokens * cost.hop
  return Hop(
    forward_compute=forward,
    forward_transfer=elements * number / keys.bandwidth,
    # Seven products instead of two.
    backward_compute=forward * 14 / 4,
    backward_transfer=elements * (number + FLOAT32_BYTES) / keys.bandwidth,
  )
