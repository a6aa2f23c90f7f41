"""Bytes that a train step sends over each mesh axis, and how fast the wires of that axis are."""

import collections
import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from lwm.config.experiment import Experiment, OptimizerConfig, Stage
from lwm.cost.layer import FLOAT32_BYTES, KEPT, Division, dtype_bytes, experts_in_use
from lwm.model.flops import body_cost, vocabulary_weights
from lwm.parallel.sharding import ShardingRules
from lwm.plan.topology import Topology
from lwm.program.trainable import trained_shares


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What crosses one mesh axis, or several at once.

  Attributes:
    axes: names of the mesh axes; "host" is the way to the host's memory.
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
  experiment: Experiment, stage: Stage, mesh: jax.sharding.Mesh, topology: Topology
) -> list[Traffic]:
  """All that a step of `stage` sends; axes of one device are left out.

  The weights of blocks are gathered in the compute dtype for the forward pass and, unless remat
  keeps them, again for the backward pass. The vocabulary tables are gathered in float32, and over
  `rules.tensor` too. Gradients of both are reduced in float32. All this happens once per
  microbatch. Activations are gathered over `rules.tensor` before each half of a block and scattered
  after it. Keys and values go around the ring, and in the backward pass their float32 gradients
  with them. `rules.ulysses` exchanges heads for tokens. The weights of experts are gathered over
  `rules.expert_model` alone; tokens travel to them and back over `rules.experts`. Before that, the
  shards of all copies of experts are scattered over `rules.experts`, and their gradients gathered.
  What is offloaded goes to the host's memory and comes back. Frozen parameters have no gradients
  and no moments.
  """
  model, rules, sizes = experiment.model, ShardingRules(), mesh.shape
  kept, division = KEPT[model.remat], Division.of(stage, sizes)
  cost, tables = body_cost(model, division), vocabulary_weights(model)
  number, tensor, tokens = dtype_bytes(model.compute_dtype), division.tensor, division.tokens
  body = (cost.weights - cost.expert_weights) / tensor
  own_experts, copies = experts_in_use(cost, division)
  experts = own_experts + copies
  stored, whole, group = rules.model, (*rules.model, rules.tensor), division.storage
  # Each device sends all but its own part.
  steps = stage.accumulation_steps
  around_experts = math.prod(sizes[axis] for axis in rules.expert_model)
  stored_share, whole_share, experts_share = (
    steps * (n - 1) / n for n in (group, group * tensor, around_experts)
  )
  trained = trained_shares(experiment, stage)
  trained_body, trained_tables = trained.body * body, trained.tables * tables
  trained_experts = trained.body * experts
  shard = (trained_body + trained_tables / tensor) / group + trained_experts / around_experts
  hops = (division.ring - 1) * (2 if kept.attention else 3)
  keys = tokens * cost.hop * (hops * number + division.ring * FLOAT32_BYTES)
  activations = (tensor - 1) / tensor * tokens * number * cost.gathered
  heads = tokens * cost.exchanged * number * (division.ulysses - 1) / division.ulysses
  dispatched = tokens / tensor * cost.dispatched * number * (1 - 1 / division.experts)
  passes = 1 if kept.everything else 2
  copied = steps * (division.experts - 1) * copies / around_experts
  sent = [
    (stored, "weights", stored_share * body * number * passes),
    (stored, "gradients", stored_share * trained_body * FLOAT32_BYTES),
    (rules.expert_model, "weights", experts_share * experts * number * passes),
    (rules.expert_model, "gradients", experts_share * trained_experts * FLOAT32_BYTES),
    (whole, "tables", whole_share * tables * FLOAT32_BYTES),
    (whole, "gradients of tables", whole_share * trained_tables * FLOAT32_BYTES),
    *(
      ((axis,), "gradients", steps * 2 * (sizes[axis] - 1) / sizes[axis] * shard * FLOAT32_BYTES)
      for axis in rules.token_axes
      if axis not in stored
    ),
    ((rules.tensor,), "activations", activations),
    (rules.experts, "tokens to experts", dispatched),
    (rules.experts, "copies of experts", copied * (number * passes + trained.body * FLOAT32_BYTES)),
    ((rules.ring,), "keys and values", keys),
    ((rules.ulysses,), "heads", heads),
  ]
  wires = Wires(mesh, topology)
  traffic = []
  for axes, what, amount in sent:
    if amount and math.prod(sizes[axis] for axis in axes) > 1:
      wire = wires.neighbour if what == "keys and values" else wires.collective
      traffic.append(Traffic(axes, what, amount, wire(axes)))

  host = topology.chip.host_bandwidth
  offloaded, moments = host_memory(experiment, stage, sizes)
  if offloaded:
    traffic.append(Traffic(("host",), "activations kept", 2 * steps * offloaded, host))
  if moments:
    # There and back at the same time.
    traffic.append(Traffic(("host",), "moments", 2 * moments, 2 * host))
  return traffic


def host_memory(
  experiment: Experiment, stage: Stage, sizes: Mapping[str, int]
) -> tuple[float, float]:
  """Bytes per device that are kept in the host's memory: (activations, moments)."""
  model, optimizer, division = experiment.model, experiment.optimizer, Division.of(stage, sizes)
  cost = body_cost(model, division)
  activations = division.tokens / stage.accumulation_steps * cost.kept
  trained = trained_shares(experiment, stage)
  parameters = trained.body * cost.weights + trained.tables * vocabulary_weights(model)
  moments = moment_bytes(optimizer) * parameters / (division.tensor * division.storage)
  return activations if KEPT[model.remat].on_host else 0, moments if optimizer.offload else 0


def moment_bytes(optimizer: OptimizerConfig) -> int:
  """Bytes of both moments of a parameter, without the scales of int8 blocks."""
  return 2 * dtype_bytes(optimizer.moment_dtype)


class Wires:
  """Bandwidth along mesh axes."""

  def __init__(self, mesh: jax.sharding.Mesh, topology: Topology):
    self._mesh, self._topology, self._chip = mesh, topology, topology.chip

  def neighbour(self, axes: tuple[str, ...]) -> float:
    """Bytes/s from each device to the next along one axis, while all of them send.

    TPU: messages whose ways through the torus share a link share its bandwidth.
    """
    if self._topology.torus:
      return self._chip.link_bandwidth / self._users_of_a_link(*axes)
    return self._chip.network_bandwidth if self._hosts(axes) > 1 else self._chip.link_bandwidth

  def collective(self, axes: tuple[str, ...]) -> float:
    """Bytes/s of an all-gather or a reduce-scatter over all devices along the axes.

    TPU: both directions of each dimension of the torus that the axes span, or one direction where
    the devices do not go all the way around. GPU: where the axes span hosts, the sum of the network
    shares of the devices in one host.
    """
    devices = self._along(axes)
    if not self._topology.torus:
      hosts = self._hosts(axes)
      share = len(devices) / hosts * self._chip.network_bandwidth
      return self._chip.link_bandwidth if hosts == 1 else min(self._chip.link_bandwidth, share)
    links = 0
    for dimension, size in enumerate(self._topology.torus):
      span = len({device.coords[dimension] for device in devices})
      if span > 1:
        links += 2 if span == size and self._topology.goes_around(dimension) else 1
    # Both devices of a TPU7x chip share its links; data for a group with both of them arrives once.
    chips = len({tuple(device.coords) for device in devices})
    share = len(devices) / chips / self._chip.devices_per_chip
    return max(links, 1) * share * self._chip.link_bandwidth

  def _users_of_a_link(self, axis: str) -> int:
    """Messages over the busiest link: each goes dimension after dimension, the shorter way."""
    devices, torus = self._mesh.devices, self._topology.torus
    users: collections.Counter[tuple[int, ...]] = collections.Counter()
    following = np.roll(devices, -1, self._mesh.axis_names.index(axis))
    for device, target in zip(devices.flat, following.flat):
      place = list(device.coords)
      for dimension, size in enumerate(torus):
        distance = target.coords[dimension] - place[dimension]
        step = 1 if distance > 0 else -1
        distance = abs(distance)
        if self._topology.goes_around(dimension) and 2 * distance > size:
          distance, step = size - distance, -step
        for _ in range(distance):
          users[*place, dimension, step] += 1
          place[dimension] = (place[dimension] + step) % size
    return max(users.values(), default=1)

  def _along(self, axes: tuple[str, ...]) -> list[jax.Device]:
    corner = tuple(slice(None) if axis in axes else 0 for axis in self._mesh.axis_names)
    return list(self._mesh.devices[corner].flat)

  def _hosts(self, axes: tuple[str, ...]) -> int:
    """Number of hosts that the devices along the axes belong to."""
    index = {device: number for number, device in enumerate(self._topology.devices)}
    per_host = self._topology.devices_per_host or len(index)
    return len({index[device] // per_host for device in self._along(axes)})
