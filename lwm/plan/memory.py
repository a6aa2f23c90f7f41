"""What a program takes of each device's memory, by compiling it: a train step, or any other."""

import dataclasses
import math
from typing import Any

import jax

from lwm.config.experiment import Stage
from lwm.plan.compilation import Buffer, Compilation, compile_ahead
from lwm.plan.topology import Topology
from lwm.program.stage import StageProgram


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device.

  Attributes:
    parameters: float32, its shard.
    optimizer: the optimizer's state, its shard, what is on the device.
    batch: its part of the other arguments: a batch, a cache, scalars.
    gradients: float32, its shard; they live among the temporaries, in the end alone. 0 of a program
      that makes none.
    temporaries: activations, gradients, gathered weights: all between arguments and results.
    rest: results that share no memory with arguments, constants.
    total: all but the gradients, which are in the temporaries.
    host: of the host's memory.
    capacity: what a program may take.
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
    """Bytes beyond the device's capacity; negative if there are some left."""
    return self.total - self.capacity

  @property
  def shortage(self) -> float:
    """Bytes that are missing, of the device's memory or of the host's; not above 0 if it fits."""
    return max(self.excess, self.host - self.host_capacity)

  @property
  def fits(self) -> bool:
    return self.shortage <= 0


def compile_train_step(
  program: StageProgram, stage: Stage, topology: Topology, offload: bool
) -> tuple[Memory, Compilation]:
  """Compiles the step that training would run, for devices that need not be there.

  Args:
    program: of the stage.
    stage: whose batches it takes.
    topology: of the program's devices.
    offload: the moments are kept in the host's memory.

  Raises:
    UserError: the compiler refuses it for another reason than the device's memory.
  """
  batch = program.abstract_batch(stage.rows_per_batch, stage.sequence_length)
  with jax.set_mesh(program.mesh):
    lowered = program.train_step.lower(program.state, batch)
  # Shardings for GPUs that are not there do not say which memory they mean.
  on_device = [
    leaf for leaf in jax.tree.leaves(program.state.optimizer_state) if not (offload and leaf.ndim)
  ]
  return compile_program(lowered, topology, program.state.params, on_device)


def compile_program(
  lowered: jax.stages.Lowered, topology: Topology, parameters: Any, optimizer_state: Any = ()
) -> tuple[Memory, Compilation]:
  """Compiles any program, say prefill or decode, for devices that need not be there.

  Args:
    lowered: of `jax.jit(...).lower(...)`, for devices of the topology.
    topology: where it is to run.
    parameters: those of its arguments that are parameters: ShapeDtypeStructs with shardings.
    optimizer_state: likewise those of a train step's optimizer, on the device.

  Raises:
    UserError: the compiler refuses it for another reason than the device's memory.
  """
  compilation = compile_ahead(lowered, topology.devices[0].platform)
  state, optimizer = shard_bytes(parameters), shard_bytes(optimizer_state)
  memory = Memory(
    parameters=state,
    optimizer=optimizer,
    batch=compilation.arguments - state - optimizer,
    gradients=state if jax.tree.leaves(optimizer_state) else 0,
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
  """Bytes of one device's shards of all arrays (ShapeDtypeStructs with shardings) of a tree."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
