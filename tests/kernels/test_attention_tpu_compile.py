"""The TPU kernels compile for real TPUs, with no TPU: libtpu's compiler, ahead of time.

What Mosaic rejects (layouts, scalar and vector memory that do not suffice) fails here.
"""

import functools

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import pytest

from kernels.attention import KeyIntervals
from kernels.attention import api
from kernels.attention import attention

MEGACORE = dict(chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1), num_slices=1)
TOPOLOGIES = {
    "v4": ("v4:2x2x1", MEGACORE),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
    "tpu7x": ("tpu7x:2x2x1", {}),
}


@functools.cache
def mesh(generation):
  """One device of that generation, which need not exist."""
  name, options = TOPOLOGIES[generation]
  topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  return Mesh(topology.devices[:1], ("x",), axis_types=(AxisType.Explicit,))


def compiled(generation, *, length, head_dim, dtype="bfloat16", H=2, G=1, soft_cap=None):
  """Forward and backward of attention with the backend that the API chooses by itself."""
  sharding = NamedSharding(mesh(generation), PartitionSpec())
  array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
  query, key = (array((1, length, heads, head_dim), dtype) for heads in (H, G))
  bound = array((1, length), jnp.int32)

  def run(query, key, value, start, stop, cotangents):
    intervals = KeyIntervals(start, stop)
    results, pull_back = jax.vjp(
        lambda *arrays: attention(*arrays, intervals, soft_cap=soft_cap), query, key, value
    )
    return *results, *pull_back(cotangents)

  with jax.set_mesh(mesh(generation)):
    cotangents = (query, array((1, length, H), jnp.float32))
    return jax.jit(run).lower(query, key, key, bound, bound, cotangents).compile()


def check(program):
  """The three kernels are there, and temporaries stay within a few copies of the operands."""
  text = program.as_text()
  for name in ("attention_forward", "attention_query_grad", "attention_key_grads"):
    assert name in text
  memory = program.memory_analysis()
  # One block of scores of all queries against 1024 keys would be eight times this.
  assert memory.temp_size_in_bytes < 6 * memory.argument_size_in_bytes


@pytest.mark.parametrize(
    "generation, length, head_dim",
    (
        ("v4", 16384, 256),
        ("v5e", 1048576, 128),
        ("v5p", 1048576, 64),
        ("v6e", 131072, 256),
        ("tpu7x", 65536, 64),
    ),
)
def test_compiles(generation, length, head_dim):
  check(compiled(generation, length=length, head_dim=head_dim))
