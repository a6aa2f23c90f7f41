"""How long a train step should take: FLOPs, bytes and wires against what the devices can do.

XLA's cost analysis counts the body of a loop once, so everything here is counted by hand from the
configuration. The assumptions are part of the answer: `Roofline.assumptions`.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax

from lwm.config.experiment import Experiment, Stage
from lwm.config.model import ModelConfig
from lwm.cost.chips import Chip
from lwm.model.flops import layer_parameters, train_flops
from lwm.parallel.sharding import ShardingRules
from lwm.plan.topology import Topology
from lwm.plan.traffic import (
  RECOMPUTED,
  Traffic,
  exchanged_kv_heads,
  feed_forward_in_chunks,
  moment_bytes,
  step_traffic,
)

# Share of the peak that large matrix products, and attention kernels, reach.
MATMUL_EFFICIENCY = 0.75
ATTENTION_EFFICIENCY = 0.55
# Reads and writes of an array [tokens, width] in one pass of a block: norms, residuals, the inputs
# and results of products. A backward pass has twice as many.
ACTIVATION_TRIPS = 12
# Of a parameter, in bytes: it and its gradient, each read and written in float32.
UPDATE_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Hop:
  """A hop of the ring, in seconds: what is computed while the next keys are on their way."""

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
    model_flops: of the whole step, as MFU counts them (lwm/model/flops.py).
    recompute_flops: what is computed beside: remat, and scores and logits in backward passes.
    traffic: bytes over each mesh axis.
    seconds: parts of the step by name; those called hidden are not in the sum.
    step_seconds: their sum.
    tokens_per_second_per_chip: all tokens of the batch.
    mfu: model FLOPs over the peak of all devices.
    hop: of the ring, None without one.
    assumptions: what else the figures rest on, in sentences.
  """

  model_flops: float
  recompute_flops: float
  traffic: tuple[Traffic, ...]
  seconds: dict[str, float]
  step_seconds: float
  tokens_per_second_per_chip: float
  mfu: float
  hop: Hop | None
  assumptions: tuple[str, ...]


def estimate(
  experiment: Experiment,
  stage: Stage,
  mesh: jax.sharding.Mesh,
  topology: Topology,
  rules: ShardingRules = ShardingRules(),
) -> Roofline:
  """Estimates a step of `stage` on `mesh`, made of the topology's devices."""
  model, chip, sizes = experiment.model, topology.chip, mesh.shape
  tokens = stage.tokens_per_batch
  # Every row one document: no stage has more work.
  pairs = stage.rows_per_batch * stage.sequence_length * (stage.sequence_length + 1) / 2
  targets = {"text_targets": tokens, "vision_targets": 0}
  attention = _attention_flops(model, pairs)
  flops = train_flops(
    model,
    tokens=tokens,
    attended_pairs=pairs,
    **targets,
    softmax_range=experiment.loss.softmax_range,
  )
  local_tokens = tokens / math.prod(sizes[axis] for axis in rules.token_axes)
  recompute, attention_again = recompute_flops(experiment, stage, pairs, sizes)

  per_second = mesh.size * chip.flops
  imbalance = 1.0
  if stage.layout == "contiguous":
    # Of n shards the last has n - 1/2 blocks of work, the mean n/2.
    imbalance = 2 - 1 / sizes["ring"]
  attention_seconds = (
    imbalance * (attention + attention_again) / (per_second * ATTENTION_EFFICIENCY)
  )
  products = flops - attention + recompute - attention_again
  compute = products / (per_second * MATMUL_EFFICIENCY) + attention_seconds
  memory = _memory_bytes(experiment, local_tokens, sizes, rules, stage) / chip.memory_bandwidth
  traffic = step_traffic(experiment, stage, mesh, topology, rules)

  def wires(*what):
    return sum(part.seconds for part in traffic if part.what in what)

  weights = wires("weights", "gradients", "tables", "gradients of tables")
  ring = wires("keys and values")
  busy = max(compute, memory)
  seconds = {
    "compute": compute,
    "memory beyond compute": max(0.0, memory - compute),
    "activations over tensor": wires("activations"),
    "heads over ulysses": wires("heads"),
    "weights and gradients, what compute does not hide": max(0.0, weights - busy),
    "keys and values, what attention does not hide": max(0.0, ring - attention_seconds),
    "activations to the host and back, what compute does not hide": max(
      0.0, wires("activations kept") - busy
    ),
    "moments from the host and back": wires("moments"),
  }
  step = sum(seconds.values())
  chips = mesh.size / chip.devices_per_chip
  return Roofline(
    model_flops=flops,
    recompute_flops=recompute,
    traffic=tuple(traffic),
    seconds=seconds,
    step_seconds=step,
    tokens_per_second_per_chip=tokens / step / chips,
    mfu=flops / step / per_second,
    hop=_hop(stage, model, traffic, pairs / mesh.size, sizes, chip.flops),
    assumptions=_assumptions(chip),
  )


def _assumptions(chip: Chip) -> tuple[str, ...]:
  network = "" if chip.is_tpu else f", network {chip.network_bandwidth / 1e9:g} GB/s a device"
  return (
    f"{chip.name}: {chip.flops / 1e12:.3g} TFLOP/s, memory {chip.memory_bandwidth / 1e9:g} GB/s, "
    f"links {chip.link_bandwidth / 1e9:g} GB/s one way{network}, "
    f"to the host {chip.host_bandwidth / 1e9:g} GB/s.",
    f"Matrix products reach {MATMUL_EFFICIENCY:.0%} of the peak, attention "
    f"{ATTENTION_EFFICIENCY:.0%} (its backward pass: seven products, four of them the model's).",
    "Every row is one document, all of it targets over the text ids: the most work there is.",
    "Weights, gradients and offloaded activations travel while anything is computed, keys and "
    "values while attention is, activations over tensor and offloaded moments while nothing is.",
  )


def _attention_flops(model: ModelConfig, pairs: float) -> float:
  return 12 * model.num_layers * model.num_heads * model.head_dim * pairs


def recompute_flops(
  experiment: Experiment, stage: Stage, pairs: float, sizes: Mapping[str, int]
) -> tuple[float, float]:
  """FLOPs beyond the model's: (all, those of attention among them).

  The down projection of a block needs no second run; the feed-forward of a sequence longer than its
  chunk always keeps nothing.
  """
  model, tokens = experiment.model, stage.tokens_per_batch
  feed_forward = 2 * model.width * model.feed_forward_width
  projections = layer_parameters(model) - 3 * model.width * model.feed_forward_width
  weights = 0
  if model.remat not in ("none", "dots"):
    weights += projections + feed_forward
  elif feed_forward_in_chunks(model, stage, sizes):
    weights += feed_forward
  if model.head_groups > 1 and model.remat in RECOMPUTED:
    # Queries, keys and values of a group, once more.
    weights += projections - model.width * model.num_heads * model.head_dim
  ids = model.vocab_size if experiment.loss.softmax_range == "all" else model.text_vocab_size
  head = 2 * tokens * model.width * ids
  # The backward kernels make scores twice and the products with the values once more.
  attention = 6 + (4 if model.remat in RECOMPUTED else 0)
  attention *= model.num_layers * model.num_heads * model.head_dim * pairs
  return 2 * model.num_layers * weights * tokens + head + attention, attention


def _memory_bytes(experiment, local_tokens, sizes, rules, stage) -> float:
  """What a device reads and writes in a step, roughly."""
  model = experiment.model
  number = 4 if model.compute_dtype == "float32" else 2
  parameters = model.num_layers * layer_parameters(model) + 2 * model.vocab_size * model.width
  shard = parameters / sizes["tensor"] / math.prod(sizes[axis] for axis in rules.model)
  update = UPDATE_BYTES + 2 * moment_bytes(experiment.optimizer)
  # Gathered (written), and read, in three passes.
  weights = 6 * number * parameters / sizes["tensor"] * stage.accumulation_steps
  passes = 3 if model.remat == "none" else 4
  activations = ACTIVATION_TRIPS * passes * model.num_layers * local_tokens * model.width * number
  return update * shard + weights + activations


def _hop(stage, model, traffic, pairs, sizes, flops) -> Hop | None:
  ring = sizes["ring"]
  if ring == 1:
    return None
  # A device's share of a layer's pairs in one hop; the heads are shared by `tensor`, the pairs not.
  forward = 4 * model.num_heads * model.head_dim * pairs / ring / (flops * ATTENTION_EFFICIENCY)
  keys = next(part for part in traffic if part.what == "keys and values")
  number = 4 if model.compute_dtype == "float32" else 2
  shards = math.prod(size for axis, size in sizes.items() if axis != "tensor")
  heads = exchanged_kv_heads(model, sizes)
  amount = 2 * stage.tokens_per_batch / shards * heads * model.head_dim
  return Hop(
    forward_compute=forward,
    forward_transfer=amount * number / keys.bandwidth,
    backward_compute=forward * 14 / 4,
    backward_transfer=amount * (number + 4) / keys.bandwidth,
  )
