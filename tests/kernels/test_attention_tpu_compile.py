"""The TPU kernels compile for real TPUs, ahead of time and without a TPU, with libtpu's compiler.

Kernels that Mosaic rejects (for their layouts, or for lack of scalar or vector memory) fail here.
"""

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from kernels.attention import api
from tests.kernels.compile_for_tpu import compile_attention, one


@pytest.mark.slow
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
  """One case per generation; for the others run python -m tests.kernels.compile_for_tpu."""
  program = compile_attention(generation, length=length, head_dim=head_dim, dtype=dtype)
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
  with jax.set_mesh(one("v5e")):
    assert api.choose(None, query(), query()).name == "pallas_tpu"
    assert api.choose(None, query("float16"), query("float16")).name == "xla"
    assert api.choose(None, query(head_dim=32), query(head_dim=32)).name == "xla"
    with pytest.raises(ValueError, match="it takes head_dim .*, not 32"):
      api.choose("pallas_tpu", query(head_dim=32), query(head_dim=32))


def test_tpus_before_v4_take_xla():
  """Compilers for older TPUs do not support the kernels' products."""
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v3:2x2", chips_per_host_bounds=(2, 2, 1), num_slices=1
  )
  query = jax.ShapeDtypeStruct((1, 1024, 2, 128), "bfloat16")
  with jax.set_mesh(Mesh(topology.devices[:1], ("x",))):
    assert api.choose(None, query, query).name == "xla"
    with pytest.raises(ValueError, match="it needs a TPU v4 or later"):
      api.choose("pallas_tpu", query, query)
