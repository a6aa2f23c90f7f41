"""Bytes that a train step sends over each mesh axis, and how fast the wires of that axis are.

Letters: T a device's tokens (of one tensor shard), n devices along an axis, M width, P parameters.
"""

import dataclasses
import math

import jax
import numpy as np

from lwm.experiment import Experiment
from lwm.experiment import Stage
from lwm.parallel.sharding import ShardingRules
from lwm.plan.topology import Topology
from lwm.train.flops import layer_parameters

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What crosses one mesh axis, or several at once.

  Attributes:
    axes: its names.
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

  Weights are gathered in the compute dtype for the forward pass and again for the backward pass
  unless remat keeps them; their gradients are reduced in float32; once for each microbatch.
  Activations cross `tensor` four times a block and pass; keys and values go round the ring, and
  in the backward pass their float32 gradients with them; `ulysses` exchanges heads for tokens.
  """
  model, sizes = experiment.model, mesh.shape
  number = np.dtype("float32" if model.compute_dtype == "float32" else "int16").itemsize
  tensor, ring = sizes["tensor"], sizes["ring"]
  tokens = stage.tokens_per_batch / math.prod(sizes[axis] for axis in rules.token_axes)
  again = model.remat in ("attention", "full")
  body = model.num_layers * layer_parameters(model) / tensor
  ends = model.vocab_size * model.width * (1 if model.tied_head else 2) / tensor
  wires = _Wires(mesh, topology)
  traffic = []

  def add(axes, what, amount, bandwidth):
    if math.prod(sizes[axis] for axis in axes) > 1:
      traffic.append(Traffic(axes, what, amount, bandwidth(axes)))

  stored = _axes(rules.model)
  group = math.prod(sizes[axis] for axis in stored)
  gathered = body * number * (1 if model.remat == "none" else 2) + ends * _FLOAT32
  share = stage.accumulation_steps * (group - 1) / group
  add(stored, "weights", share * gathered, wires.collective)
  add(stored, "gradients", share * (body + ends) * _FLOAT32, wires.collective)
  rest = tuple(axis for axis in rules.token_axes if axis not in stored)
  for axis in rest:
    n = sizes[axis]
    amount = stage.accumulation_steps * 2 * (n - 1) / n * (body + ends) / group * _FLOAT32
    add((axis,), "gradients", amount, wires.collective)

  # A reduce-scatter or an all-gather of the activations, or half of an all-reduce of them.
  half = (tensor - 1) / tensor * tokens * model.width * number
  passes = 4 + 4 + (3 if again else 0)
  add(("tensor",), "activations", half * (model.num_layers * passes + 6), wires.collective)

  keys = 2 * tokens * model.num_kv_heads * model.head_dim / tensor
  hops = (ring - 1) * (3 if model.remat == "full" else 2)
  amount = model.num_layers * keys * (hops * number + ring * _FLOAT32)
  add(("ring",), "keys and values", amount, wires.neighbour)

  ulysses = sizes["ulysses"]
  heads = 2 * (model.num_heads + model.num_kv_heads)
  exchanged = tokens * heads * model.head_dim / tensor * number * (ulysses - 1) / ulysses
  passes = 2 + (1 if again else 0)
  add(("ulysses",), "heads", model.num_layers * passes * exchanged, wires.collective)
  return traffic


class _Wires:
  """Bandwidth along mesh axes."""

  def __init__(self, mesh: jax.sharding.Mesh, topology: Topology):
    self._mesh, self._topology, self._chip = mesh, topology, topology.chip

  def neighbour(self, axes: tuple[str, ...]) -> float:
    """From each device to the next along one axis, in one direction."""
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
        links += 2 if span == size and size > 2 else 1
    # Both devices of a TPU7x chip share its links.
    return max(links, 1) * self._chip.link_bandwidth

  def _along(self, axes: tuple[str, ...]) -> list[jax.Device]:
    corner = tuple(slice(None) if axis in axes else 0 for axis in self._mesh.axis_names)
    return list(self._mesh.devices[corner].flat)

  def _hosts(self, axes: tuple[str, ...]) -> int:
    index = {device: number for number, device in enumerate(self._topology.devices)}
    return len({index[d] // self._topology.devices_per_host for d in self._along(axes)})


def _axes(names: str | tuple[str, ...]) -> tuple[str, ...]:
  return (names,) if isinstance(names, str) else names
