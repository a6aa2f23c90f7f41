"""Memory per device of a train step or any other program, found by compiling it."""

import dataclasses
import math
from typing import Any

import jax

from lwm.plan.compilation import Buffer, Compilation, compile_ahead
from lwm.plan.topology import Topology
from lwm.program.stage import StageProgram


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device.

  Attributes:
    parameters: shard of the float32 parameters.
    optimizer: shard of the optimizer's state, without what is kept in the host's memory.
    batch: shards of the other arguments: a batch, a cache, scalars.
    gradients: shard of the float32 gradients, which are a part of the temporaries; 0 for a program
      without an optimizer.
    temporaries: everything between arguments and results: activations, gradients, gathered weights.
    rest: results that share no memory with arguments, and constants.
    total: the sum of all parts; gradients count once, as temporaries.
    host: bytes in the host's memory.
    capacity: the memory that a program may use.
    host_capacity: the device's share of its host's memory.
    buffers: the largest first.
  """

  parameters: int
  optimizer: int
  batch: int
  gradients: int
  temporaries: int
  rest: int
  total: int
  host: int
  capacity: int
  host_capacity: float
  buffers: tuple[Buffer, ...]

  @property
  def excess(self) -> int:
    """Bytes beyond the device's capacity; negative if memory is left."""
    return self.total - self.capacity

  @property
  def shortage(self) -> float:
    """Bytes that are missing, in the device's or the host's memory; at most 0 if it fits."""
    return max(self.excess, self.host - self.host_capacity)

  @property
  def fits(self) -> bool:
    return self.shortage <= 0


def compile_train_step(
  program: StageProgram, topology: Topology, offload: bool
) -> tuple[Memory, Compilation]:
  """Compiles the step that training would run, for devices that you don't need to have.

  Args:
    program: the stage's program, for devices of the topology.
    topology: the machine.
    offload: whether the moments are kept in the host's memory.

  Raises a UserError as `compile_program` does.
  """
  with jax.set_mesh(program.mesh):
    lowered = program.traced.lower()
  # Shardings for GPUs that this machine lacks don't say which memory they mean.
  on_device = [
    leaf for leaf in jax.tree.leaves(program.state.optimizer_state) if not (offload and leaf.ndim)
  ]
  trained, _ = program.trainable.split(program.state.params)
  return compile_program(lowered, topology, program.state.params, on_device, trained)


def compile_program(
  lowered: jax.stages.Lowered,
  topology: Topology,
  parameters: Any,
  optimizer_state: Any = (),
  trained: Any = (),
) -> tuple[Memory, Compilation]:
  """Compiles any program, for example prefill or decode, for devices that you don't need to have.

  Args:
    lowered: the result of `jax.jit(...).lower(...)`, for devices of the topology.
    topology: the machine.
    parameters: the arguments that are parameters: ShapeDtypeStructs with shardings.
    optimizer_state: the arguments that are the optimizer's state on the device, likewise.
    trained: the parameters that have gradients, likewise.

  Raises:
    UserError: the compiler refuses the program for another reason than the device's memory.
  """
  compilation = compile_ahead(lowered, topology.devices[0].platform)
  state, optimizer = shard_bytes(parameters), shard_bytes(optimizer_state)
  memory = Memory(
    parameters=state,
    optimizer=optimizer,
    batch=compilation.arguments - state - optimizer,
    gradients=shard_bytes(trained),
    temporaries=compilation.temporaries,
    rest=compilation.total - compilation.arguments - compilation.temporaries,
    total=compilation.total,
    host=compilation.host,
    capacity=topology.chip.memory,
    host_capacity=topology.chip.host_memory,
    buffers=compilation.buffers,
  )
  return memory, compilation


def shard_bytes(tree: Any) -> int:
  """Bytes per device of a tree's arrays (ShapeDtypeStructs with shardings)."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
