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


@pytest.fixture(autouse=True)
def not_cached():
  """JAX would write programs for TPUs to its cache, and then could not read them without one."""
  name = "jax_persistent_cache_min_compile_time_secs"
  least = getattr(jax.config, name)
  jax.config.update(name, float("inf"))
  yield
  jax.config.update(name, least)


@functools.cache
def mesh(generation):
  """One device of that generation, which need not exist."""
  name, options = TOPOLOGIES[generation]
  topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  return Mesh(topology.devices[:1], ("x",), axis_types=(AxisType.Explicit,))


def compiled(generation, *, length, head_dim, dtype, H=2, G=1):
  """Forward and backward of attention with the backend that the API chooses by itself."""
  sharding = NamedSharding(mesh(generation), PartitionSpec())
  array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
  query, key = (array((1, length, heads, head_dim), dtype) for heads in (H, G))
  bound = array((1, length), jnp.int32)

  def run(query, key, value, start, stop, cotangents):
    intervals = KeyIntervals(start, stop)
    results, pull_back = jax.vjp(lambda *arrays: attention(*arrays, intervals), query, key, value)
    return *results, *pull_back(cotangents)

  with jax.set_mesh(mesh(generation)):
    cotangents = (query, array((1, length, H), jnp.float32))
    return jax.jit(run).lower(query, key, key, bound, bound, cotangents).compile()


@pytest.mark.parametrize(
    "generation, length, head_dim, dtype",
    (
        ("v4", 16384, 256, "float32"),  # The least vector memory, and the most use of it.
        ("v5e", 1048576, 128, "bfloat16"),
        ("v5p", 65536, 64, "bfloat16"),
        ("v6e", 32768, 256, "bfloat16"),
        ("tpu7x", 131072, 128, "bfloat16"),
    ),
)
def test_compiles(generation, length, head_dim, dtype):
  program = compiled(generation, length=length, head_dim=head_dim, dtype=dtype)
  text = program.as_text()
  for name in ("attention_forward", "attention_query_grad", "attention_key_grads"):
    assert name in text
  # Query, key, value and cotangents, as tiles and in float32. Scores of one head against a single
  # block of keys would be more.
  memory = program.memory_analysis()
  assert memory.temp_size_in_bytes < 4 * memory.argument_size_in_bytes


def test_the_platform_of_the_mesh_chooses_the_backend():
  def query(dtype="bfloat16", head_dim=64):
    return jax.ShapeDtypeStruct((1, 8, 2, head_dim), dtype)

  assert api.choose(None, query(), query()).name == "xla"
  with pytest.raises(ValueError, match="it needs a TPU"):
    api.choose("pallas_tpu", query(), query())
  with jax.set_mesh(mesh("v5e")):
    assert api.choose(None, query(), query()).name == "pallas_tpu"
    assert api.choose(None, query("float16"), query("float16")).name == "xla"
    assert api.choose(None, query(head_dim=32), query(head_dim=32)).name == "xla"
    with pytest.raises(ValueError, match="head_dim 32 is none of"):
      api.choose("pallas_tpu", query(head_dim=32), query(head_dim=32))
