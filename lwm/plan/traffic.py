"""Bytes that a train step sends over each mesh axis, and how fast the wires of that axis are.

Letters: T a device's tokens (of one tensor shard), n devices along an axis, M width, P parameters.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from lwm.config.experiment import Experiment, OptimizerConfig, Stage
from lwm.config.model import ModelConfig
from lwm.model.flops import layer_parameters
from lwm.parallel.sharding import ShardingRules
from lwm.plan.topology import Topology

# Remat policies that compute attention a second time, and those that keep in the host's memory.
RECOMPUTED = ("full", "offload")
OFFLOADED = ("offload", "offload_attention")
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What crosses one mesh axis, or several at once.

  Attributes:
    axes: its names; "host" is the way to the host's memory.
    what: what travels.
    bytes: sent by each device in a step.
    bandwidth: bytes/s that a device can send along these axes in this way.
  """

  axes: tuple[str, ...]
  what: str
  bytes: float
  bandwidth: float

  @property
  def seconds(self) -> float:
    return self.bytes / self.bandwidth


def step_traffic(
  experiment: Experiment,
  stage: Stage,
  mesh: jax.sharding.Mesh,
  topology: Topology,
  rules: ShardingRules = ShardingRules(),
) -> list[Traffic]:
  """All that a step of `stage` sends, axes of one device left out.

  The weights of blocks are gathered in the compute dtype for the forward pass and again for the
  backward pass unless remat keeps them, the tables in float32 and over `tensor` too; their
  gradients are reduced in float32; once for each microbatch. Activations are gathered over `tensor`
  before each half of a block and scattered after it; keys and values go round the ring, and in the
  backward pass their float32 gradients with them; `ulysses` exchanges heads for tokens. What is
  offloaded goes to the host's memory and comes back.
  """
  model, sizes = experiment.model, mesh.shape
  number = np.dtype("float32" if model.compute_dtype == "float32" else "int16").itemsize
  tensor, ring, ulysses = sizes["tensor"], sizes["ring"], sizes["ulysses"]
  tokens = stage.tokens_per_batch / math.prod(sizes[axis] for axis in rules.token_axes)
  body = model.num_layers * layer_parameters(model) / tensor
  tables = model.vocab_size * model.width * (1 if model.tied_head else 2)
  wires = _Wires(mesh, topology)
  traffic = []

  def add(axes, what, amount, bandwidth):
    if amount and math.prod(sizes[axis] for axis in axes) > 1:
      traffic.append(Traffic(axes, what, amount, bandwidth(axes)))

  stored = rules.model
  group = math.prod(sizes[axis] for axis in stored)
  share = stage.accumulation_steps * (group - 1) / group
  add(
    stored, "weights", share * body * number * (1 if model.remat == "none" else 2), wires.collective
  )
  add(stored, "gradients", share * body * _FLOAT32, wires.collective)
  whole = (*stored, rules.tensor)
  share = stage.accumulation_steps * (group * tensor - 1) / (group * tensor)
  add(whole, "tables", share * tables * _FLOAT32, wires.collective)
  add(whole, "gradients of tables", share * tables * _FLOAT32, wires.collective)
  for axis in rules.token_axes:
    if axis not in stored:
      n, shard = sizes[axis], (body + tables / tensor) / group
      amount = stage.accumulation_steps * 2 * (n - 1) / n * shard * _FLOAT32
      add((axis,), "gradients", amount, wires.collective)

  # A reduce-scatter or an all-gather of the activations.
  half = (tensor - 1) / tensor * tokens * model.width * number
  again = 3
  if model.remat == "none":
    again = 1 if feed_forward_in_chunks(model, stage, sizes) else 0
  if model.head_groups > 1:
    # Each group gathers its tokens, and again backward.
    again += 2 * (model.head_groups - 1) + (model.remat in RECOMPUTED)
  add(("tensor",), "activations", half * model.num_layers * (4 + 4 + again), wires.collective)

  kv_heads = exchanged_kv_heads(model, sizes)
  keys = 2 * tokens * kv_heads * model.head_dim
  hops = (ring - 1) * (3 if model.remat in RECOMPUTED else 2)
  amount = model.num_layers * keys * (hops * number + ring * _FLOAT32)
  add(("ring",), "keys and values", amount, wires.neighbour)

  query_heads = model.num_heads // tensor
  heads = (2 if model.remat == "none" else 3) * 2 * (query_heads + kv_heads)
  if model.head_groups > 1 and model.remat in RECOMPUTED:
    # Queries, keys and values of a group, once more.
    heads += query_heads + 2 * kv_heads
  exchanged = tokens * heads * model.head_dim * number * (ulysses - 1) / ulysses
  add(("ulysses",), "heads", model.num_layers * exchanged, wires.collective)

  host = topology.chip.host_bandwidth
  activations, moments = host_memory(experiment, stage, sizes, rules)
  if activations:
    amount = 2 * stage.accumulation_steps * activations
    traffic.append(Traffic(("host",), "activations kept", amount, host))
  if moments:
    # There and back at the same time.
    traffic.append(Traffic(("host",), "moments", 2 * moments, 2 * host))
  return traffic


def host_memory(
  experiment: Experiment,
  stage: Stage,
  sizes: Mapping[str, int],
  rules: ShardingRules = ShardingRules(),
) -> tuple[float, float]:
  """Bytes of one device that are kept in its host's memory: (activations, moments)."""
  model, tensor = experiment.model, sizes["tensor"]
  activations = moments = 0
  if model.remat in OFFLOADED:
    number = 4 if model.compute_dtype == "float32" else 2
    tokens = stage.tokens_per_batch / stage.accumulation_steps
    tokens /= math.prod(sizes[axis] for axis in rules.token_axes) * tensor
    kept = model.width * number
    if model.remat not in RECOMPUTED:
      kept += model.num_heads * (model.head_dim * number + _FLOAT32)
    activations = model.num_layers * tokens * kept
  if experiment.optimizer.offload:
    tables = model.vocab_size * model.width * (1 if model.tied_head else 2)
    parameters = model.num_layers * layer_parameters(model) + tables
    shards = tensor * math.prod(sizes[axis] for axis in rules.model)
    moments = moment_bytes(experiment.optimizer) * parameters / shards
  return activations, moments


def exchanged_kv_heads(model: ModelConfig, sizes: Mapping[str, int]) -> int:
  """Of one tensor shard: repeated where there are too few of them for `ulysses`."""
  return math.lcm(model.num_kv_heads // sizes["tensor"], sizes["ulysses"])


def feed_forward_in_chunks(model: ModelConfig, stage: Stage, sizes: Mapping[str, int]) -> bool:
  """Whether the feed-forward of a device goes by chunks, which its backward pass makes again."""
  return stage.sequence_length // (sizes["ring"] * sizes["ulysses"]) > model.feed_forward_chunk


def moment_bytes(optimizer: OptimizerConfig) -> int:
  """Of both moments of a parameter; the scales of int8 blocks left out."""
  return 2 * {"float32": 4, "bfloat16": 2, "int8": 1}[optimizer.moment_dtype]


class _Wires:
  """Bandwidth along mesh axes."""

  def __init__(self, mesh: jax.sharding.Mesh, topology: Topology):
    self._mesh, self._topology, self._chip = mesh, topology, topology.chip

  def neighbour(self, axes: tuple[str, ...]) -> float:
    """From each device to the next along one axis, all at the same time.

    TPU: those whose ways through the torus share a link share its bandwidth.
    """
    if self._topology.torus:
      return self._chip.link_bandwidth / self._users_of_a_link(*axes)
    if self._topology.devices_per_host is None:
      return self._chip.link_bandwidth
    return self._chip.network_bandwidth if self._hosts(axes) > 1 else self._chip.link_bandwidth

  def collective(self, axes: tuple[str, ...]) -> float:
    """Of an all-gather or a reduce-scatter over all devices along the axes.

    TPU: both directions of each dimension of the torus that the axes span, one where they do not go
    all the way round. GPU: where they span hosts, the network shares of those in one host together.
    """
    devices = self._along(axes)
    if self._topology.devices_per_host is not None:
      hosts = self._hosts(axes)
      if hosts == 1:
        return self._chip.link_bandwidth
      share = len(devices) / hosts * self._chip.network_bandwidth
      return min(self._chip.link_bandwidth, share)
    if not self._topology.torus:
      return self._chip.link_bandwidth
    links = 0
    for dimension, size in enumerate(self._topology.torus):
      span = len({device.coords[dimension] for device in devices})
      if span > 1:
        links += 2 if span == size and self._topology.goes_round(dimension) else 1
    # Both devices of a TPU7x chip share its links; what comes for a group of both is for both.
    chips = len({tuple(device.coords) for device in devices})
    share = len(devices) / chips / self._chip.devices_per_chip
    return max(links, 1) * share * self._chip.link_bandwidth

  def _users_of_a_link(self, axis: str) -> int:
    """Messages over the busiest link, dimension after dimension, the shorter way round."""
    devices, torus = self._mesh.devices, self._topology.torus
    users = collections.Counter()
    following = np.roll(devices, -1, self._mesh.axis_names.index(axis))
    for device, target in zip(devices.flat, following.flat):
      place = list(device.coords)
      for dimension, size in enumerate(torus):
        distance = target.coords[dimension] - place[dimension]
        step = 1 if distance > 0 else -1
        distance = abs(distance)
        if self._topology.goes_round(dimension) and 2 * distance > size:
          distance, step = size - distance, -step
        for _ in range(distance):
          users[*place, dimension, step] += 1
          place[dimension] = (place[dimension] + step) % size
    return max(users.values(), default=1)

  def _along(self, axes: tuple[str, ...]) -> list[jax.Device]:
    corner = tuple(slice(None) if axis in axes else 0 for axis in self._mesh.axis_names)
    return list(self._mesh.devices[corner].flat)

  def _hosts(self, axes: tuple[str, ...]) -> int:
    index = {device: number for number, device in enumerate(self._topology.devices)}
    return len({index[d] // self._topology.devices_per_host for d in self._along(axes)})
