"""How fast an engine should read a prompt and generate tokens, from FLOPs, bytes and transfers.

FLOPs and bytes come from the configuration, as for training (lwm/plan/roofline.py), and transfers
from the traced programs. The assumptions are part of the answer: `assumptions`.
"""

import dataclasses
import math

import jax

from lwm.config.model import ModelConfig
from lwm.cost.chips import Chip
from lwm.cost.layer import dtype_bytes
from lwm.cost.traced import Transfer, transfers
from lwm.infer.ahead import Programs
from lwm.model.flops import body_cost
from lwm.parallel.sharding import ShardingRules
from lwm.plan.memory import shard_bytes
from lwm.plan.roofline import attended_pairs, machine_text
from lwm.plan.topology import Topology
from lwm.plan.traffic import Wires

# The best published shares of the peak in a prefill of a million tokens (arXiv 2411.01783) and of
# the memory bandwidth in decode (arXiv 2604.15464): goals, which nothing here has measured.
PREFILL_EFFICIENCY = 0.63
DECODE_EFFICIENCY = 0.86
# Seconds that a collective takes, however little it sends.
COLLECTIVE_LATENCY = 5e-6
# Computation hides these transfers: gathers of weights, and keys in the ring.
_HIDDEN = ("reshard", "ppermute")


@dataclasses.dataclass(frozen=True)
class Phase:
  """An estimate of prefill, or of one step of decode, on one device.

  Attributes:
    flops: of matrix products and attention.
    bytes: weights and cached keys and values that are read.
    sent: bytes that are sent to other devices.
    collectives: number of collectives.
    seconds: parts by name, without what other parts hide.
  """

  flops: float
  bytes: float
  sent: float
  collectives: int
  seconds: dict[str, float]

  @property
  def total(self) -> float:
    """The sum of `seconds`."""
    return sum(self.seconds.values())


def estimate_prefill(
  model: ModelConfig, mesh: jax.sharding.Mesh, topology: Topology, programs: Programs
) -> Phase:
  """Estimates the prefill of rows that fill the cache, on `mesh`, a mesh of the topology's devices.

  Products are divided over the devices that divide tokens, rows or heads. The work of attention to
  earlier chunks is divided over all devices, because each has its part of the cache.
  """
  sizes, rules = mesh.shape, ShardingRules.inference(few_tokens=False)
  cost, tensor = body_cost(model), sizes[rules.tensor]
  rows, context, chunk = programs.num_rows, programs.context, programs.chunk
  num_chunks = -(-context // chunk)
  dividing = tensor * math.prod(sizes[axis] for axis in rules.token_axes)
  pairs = attended_pairs(model, context)
  new_pairs = min(pairs, num_chunks * attended_pairs(model, chunk))
  flops = rows * (
    cost.flops * context / dividing
    + cost.pair_flops * ((pairs - new_pairs) / mesh.size + new_pairs / dividing)
  )
  # Gathered weights are written and read. On average, half of the cache is filled.
  gathered = 2 * dtype_bytes(model.compute_dtype) * cost.weights / tensor
  moved = num_chunks * (gathered + _cache_bytes(model, programs) / 2)
  sent = [
    transfer._replace(times=num_chunks * transfer.times)
    for transfer in transfers(programs.prefill.jaxpr.jaxpr, sizes)
  ]
  return _phase(flops, moved, sent, mesh, topology)


def estimate_decode(
  model: ModelConfig, mesh: jax.sharding.Mesh, topology: Topology, programs: Programs
) -> Phase:
  """Estimates the step that generates one token per row when the cache is full.

  Each device reads its shards of the weights and of the cache once. Of an embedding, it reads the
  rows of a few ids only, unless it is the head too.
  """
  cost, head = body_cost(model), model.vocab_size * model.width
  pairs = attended_pairs(model, programs.context) - attended_pairs(model, programs.context - 1)
  flops = programs.num_rows * (cost.flops + 2 * head + cost.pair_flops * pairs) / mesh.size
  weights = shard_bytes(programs.params)
  if not model.tied_head:
    weights -= shard_bytes(programs.params["embedding"])
  moved = weights + _cache_bytes(model, programs)
  sent = transfers(programs.decode.jaxpr.jaxpr, mesh.shape)
  return _phase(flops, moved, list(sent), mesh, topology)


def assumptions(chip: Chip) -> tuple[str, ...]:
  """Sentences that say what the estimates rest on."""
  return (
    machine_text(chip),
    f"Prefill reaches {PREFILL_EFFICIENCY:.0%} of the peak (arXiv 2411.01783) and decode "
    f"{DECODE_EFFICIENCY:.0%} of the memory bandwidth (arXiv 2604.15464), the best published.",
    f"A collective takes {COLLECTIVE_LATENCY * 1e6:.0f} us and the time of its bytes. Weights and "
    "the keys of a ring travel during computation, everything else during none.",
    "All rows fill the cache. Decode reads all weights once per step, those of all experts too.",
  )


def _cache_bytes(model: ModelConfig, programs: Programs) -> float:
  """Bytes of a device's keys and values that the last token attends to."""
  cache = programs.cache
  seen = min(model.sliding_window or programs.context, programs.context) / programs.context
  return seen * shard_bytes((cache.key_LxBxKxGxD, cache.value_LxBxKxGxD))


def _phase(
  flops: float, moved: float, sent: list[Transfer], mesh: jax.sharding.Mesh, topology: Topology
) -> Phase:
  chip, wires = topology.chip, Wires(mesh, topology)

  def wire_seconds(are_hidden: bool) -> float:
    seconds = 0.0
    for transfer in sent:
      if (transfer.kind in _HIDDEN) == are_hidden:
        wire = wires.neighbour if transfer.kind == "ppermute" else wires.collective
        each = COLLECTIVE_LATENCY + transfer.bytes / wire(transfer.axes)
        seconds += transfer.times * each
    return seconds

  compute = flops / (chip.flops * PREFILL_EFFICIENCY)
  memory = moved / (chip.memory_bandwidth * DECODE_EFFICIENCY)
  busy = max(compute, memory)
  seconds = {
    "compute": compute,
    "memory beyond compute": max(0.0, memory - compute),
    "collectives": wire_seconds(are_hidden=False),
    "weights and keys, what computation does not hide": max(
      0.0, wire_seconds(are_hidden=True) - busy
    ),
  }
  return Phase(
    flops=flops,
    bytes=moved,
    sent=sum(transfer.times * transfer.bytes for transfer in sent),
    collectives=sum(transfer.times for transfer in sent),
    seconds=seconds,
  )
