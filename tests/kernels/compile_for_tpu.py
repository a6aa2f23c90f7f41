"""Compiles attention, forward and backward, for TPUs by libtpu on a machine without one.

  python -m tests.kernels.compile_for_tpu [GENERATION ...]

compiles the whole matrix of generations, head_dims and lengths, and prints a line of JSON for each:
seconds, bytes of temporaries and of arguments, or the compiler's error.
"""

import contextlib
import functools
import itertools
import json
import sys
import time

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from kernels.attention import KeyIntervals
from kernels.attention import attention

MEGACORE = dict(chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1), num_slices=1)
TOPOLOGIES = {
    "v4": ("v4:2x2x1", MEGACORE),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
    "tpu7x": ("tpu7x:2x2x1", {}),
}
HEAD_DIMS = (64, 128, 256)
LENGTHS = (16384, 131072, 1048576)


@functools.cache
def one(generation: str) -> Mesh:
  """One device of that generation, which need not exist."""
  name, options = TOPOLOGIES[generation]
  topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  return Mesh(topology.devices[:1], ("x",), axis_types=(AxisType.Explicit,))


@functools.cache
def ring_of_sixteen() -> Mesh:
  """Sixteen v5p chips on a mesh axis "ring"."""
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x4")
  return Mesh(topology.devices, ("ring",), axis_types=(AxisType.Explicit,))


def compiled(function, mesh: Mesh, *arguments, spec: PartitionSpec = PartitionSpec()):
  """The program for `mesh`, of arguments (trees of shapes and dtypes) that `spec` shards."""
  sharding = NamedSharding(mesh, spec)
  arguments = jax.tree.map(
      lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), arguments
  )
  with jax.set_mesh(mesh), not_cached():
    return jax.jit(function).lower(*arguments).compile()


@contextlib.contextmanager
def not_cached():
  """JAX would write programs for TPUs to its cache, and then could not read them without one."""
  name = "jax_persistent_cache_min_compile_time_secs"
  least = getattr(jax.config, name)
  jax.config.update(name, float("inf"))
  try:
    yield
  finally:
    jax.config.update(name, least)


def values_and_gradients(attend=attention):
  """`(query, key, value, start, stop, cotangents) ->` results and gradients of `attend`."""

  def run(query, key, value, start, stop, cotangents):
    intervals = KeyIntervals(start, stop)
    results, pull_back = jax.vjp(lambda *arrays: attend(*arrays, intervals), query, key, value)
    return *results, *pull_back(cotangents)

  return run


def attention_arguments(length: int, head_dim: int, dtype: str, H: int = 2, G: int = 1):
  """What `values_and_gradients` takes, a batch of one."""
  array = jax.ShapeDtypeStruct
  query, key = (array((1, length, heads, head_dim), dtype) for heads in (H, G))
  bound = array((1, length), jnp.int32)
  return query, key, key, bound, bound, (query, array((1, length, H), jnp.float32))


def compile_attention(generation: str, *, length: int, head_dim: int, dtype: str):
  """Forward and backward of attention with the backend that the API chooses by itself."""
  arguments = attention_arguments(length, head_dim, dtype)
  return compiled(values_and_gradients(), one(generation), *arguments)


def main() -> None:
  for generation, head_dim, length in itertools.product(
      sys.argv[1:] or TOPOLOGIES, HEAD_DIMS, LENGTHS
  ):
    case = dict(generation=generation, head_dim=head_dim, length=length)
    started = time.perf_counter()
    try:
      memory = compile_attention(**case, dtype="bfloat16").memory_analysis()
      case |= dict(
          temporaries=memory.temp_size_in_bytes, arguments=memory.argument_size_in_bytes
      )
    except jax.errors.JaxRuntimeError as error:
      case |= dict(error=str(error))
    print(json.dumps(case | dict(seconds=round(time.perf_counter() - started, 1))), flush=True)


if __name__ == "__main__":
  main()
