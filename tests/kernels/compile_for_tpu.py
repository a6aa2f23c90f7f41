"""Compiles attention and decode for TPUs with libtpu, on a machine without a TPU.

  python -m tests.kernels.compile_for_tpu [GENERATION ...]

compiles all combinations (forward and backward of attention by generation, head_dim and length;
decode by generation and dtype of the cache) and prints one line of JSON for each: seconds, bytes of
temporaries and arguments, or the compiler's error.
"""

import contextlib
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels.attention import KeyIntervals, attention
from kernels.decode import decode_attention, quantize, write

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
CACHES = ("bfloat16", "int8")


@functools.cache
def one(generation: str) -> Mesh:
  """A mesh of one device of that generation, which this machine need not have."""
  name, options = TOPOLOGIES[generation]
  topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  return Mesh(topology.devices[:1], ("x",), axis_types=(AxisType.Explicit,))


@functools.cache
def ring_of_sixteen() -> Mesh:
  """Sixteen v5p chips on a mesh axis "ring"."""
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x4")
  return Mesh(topology.devices, ("ring",), axis_types=(AxisType.Explicit,))


def compiled(
  function, mesh: Mesh, *arguments, spec=PartitionSpec(), donate_argnums=(), options=None
):
  """The program for `mesh`, of arguments (trees of shapes and dtypes) that `spec` shards."""
  sharding = NamedSharding(mesh, spec)
  arguments = jax.tree.map(
    lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), arguments
  )
  with jax.set_mesh(mesh), not_cached():
    lowered = jax.jit(function, donate_argnums=donate_argnums).lower(*arguments)
    return lowered.compile(compiler_options=options)


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
  """Forward and backward of attention, with the backend that the API chooses."""
  arguments = attention_arguments(length, head_dim, dtype)
  return compiled(values_and_gradients(), one(generation), *arguments)


def compile_decode(
  generation: str, *, cache: str, length: int = LENGTHS[-1], G: int = 8, head_dim: int = 128
):
  """Two layers of a decoding step: write a token to the cache, and attend with 4 * G heads."""
  array = jax.ShapeDtypeStruct
  query, new = (array((1, 1, heads, head_dim), jnp.bfloat16) for heads in (4 * G, G))
  key = array((2, 1, length, G, head_dim), jnp.bfloat16)
  if cache == "int8":
    new, key = (jax.eval_shape(quantize, floats) for floats in (new, key))

  def step(query, key, value, new, position):
    def layer(carry, index):
      query, *caches = carry
      caches = [write(cached, new, index, position) for cached in caches]
      start = jnp.zeros((1, 1), jnp.int32)
      intervals = KeyIntervals(start, start + position + 1)
      return (decode_attention(query, *caches, intervals, layer=index)[0], *caches), None

    return jax.lax.scan(layer, (query, key, value), jnp.arange(2))[0]

  position = array((), jnp.int32)
  arguments = query, key, key, new, position
  return compiled(step, one(generation), *arguments, donate_argnums=(1, 2))


def matrix(generations) -> Iterator[tuple[Callable, dict]]:
  """All combinations, each as a function of this module and its arguments."""
  for generation, head_dim, length in itertools.product(generations, HEAD_DIMS, LENGTHS):
    case = dict(generation=generation, length=length, head_dim=head_dim, dtype="bfloat16")
    yield compile_attention, case
  for generation, cache in itertools.product(generations, CACHES):
    yield compile_decode, dict(generation=generation, cache=cache)


def main() -> None:
  for function, case in matrix(sys.argv[1:] or TOPOLOGIES):
    started = time.perf_counter()
    try:
      memory = function(**case).memory_analysis()
      result = dict(temporaries=memory.temp_size_in_bytes, arguments=memory.argument_size_in_bytes)
    except jax.errors.JaxRuntimeError as error:
      result = dict(error=str(error))
    result |= dict(seconds=round(time.perf_counter() - started, 1))
    print(json.dumps(dict(of=function.__name__) | case | result), flush=True)


if __name__ == "__main__":
  main()
