"""What a step changes: parameters, the optimizer's moments, and the step count.

Jitted functions make all arrays with their final shardings, so that no device ever holds more than
its shard. A stage starts from the parameters of the stage before it, with fresh moments, a count
from 0 and its own warm-up. LWM also loads only parameters between stages.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lwm.program.trainable import Trainable


class TrainState(NamedTuple):
  """Parameters (float32), the optimizer's state, and the stage's steps done (int32 scalar).

  The leaves are arrays, or ShapeDtypeStructs of an abstract state.
  """

  params: Any
  optimizer_state: Any
  step: Any


def abstract_state(
  abstract_params: Any,
  optimizer: optax.GradientTransformation,
  trainable: Trainable,
  mesh: jax.sharding.Mesh,
  offload: bool,
) -> TrainState:
  """ShapeDtypeStructs of the whole state, shardings included.

  Args:
    abstract_params: the parameters' ShapeDtypeStructs with their shardings.
    optimizer: its moments are sharded like their parameters.
    trainable: the parameters that have moments.
    mesh: the mesh of those shardings.
    offload: whether the moments are kept in host memory.
  """
  host = "pinned_host" if offload else None

  def place(leaf):
    if leaf.ndim:
      sharding = NamedSharding(mesh, leaf.sharding.spec, memory_kind=host)
    else:
      sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  with jax.set_mesh(mesh):
    trained = trainable.split(abstract_params)[0]
    optimizer_state = jax.tree.map(place, jax.eval_shape(optimizer.init, trained))
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
  return TrainState(abstract_params, optimizer_state, step)


def fresh_state(
  params: Any, optimizer: optax.GradientTransformation, trainable: Trainable, abstract: TrainState
) -> TrainState:
  """The state at step 0 with `params`, which must already have the shardings of `abstract`."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  moments, step = jax.jit(
    lambda params: (optimizer.init(params), jnp.zeros((), jnp.int32)),
    out_shardings=(shardings.optimizer_state, shardings.step),
  )(trainable.split(params)[0])
  return TrainState(params, moments, step)
