"""The TPU decode kernel compiles for real TPUs, without a TPU, and reads the cache in place."""

import jax
import jax.numpy as jnp
import pytest

from kernels import backends
from kernels.decode import quantize, whole_length
from kernels.decode.api import BACKENDS
from tests.kernels.compile_for_tpu import CACHES, TOPOLOGIES, compile_decode, one

TWO_CORES = ("v4", "v5p")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_compiles_for_a_million_positions_and_copies_none(generation, cache):
  program = compile_decode(generation, cache=cache)
  text, memory = program.as_text(), program.memory_analysis()
  cores = 2 if generation in TWO_CORES else 1
  assert "attention_decode" in text and f"f32[{cores},1,32,128]" in text
  assert memory.argument_size_in_bytes > 2**32
  assert memory.temp_size_in_bytes < 2**20


@pytest.mark.parametrize(
  "G, head_dim, cache",
  ((2, 128, "bfloat16"), (2, 128, "int8"), (3, 64, "bfloat16"), (8, 256, "int8")),
)
def test_other_heads_copy_none(G, head_dim, cache):
  program = compile_decode("v5e", cache=cache, G=G, head_dim=head_dim)
  assert "attention_decode" in program.as_text()
  assert program.memory_analysis().temp_size_in_bytes < 2**20


def choice(*, name=None, dtype=jnp.bfloat16, K=1024, G=8, D=128, is_int8=False):
  query = jax.ShapeDtypeStruct((1, 1, 32, D), dtype)
  key = jax.ShapeDtypeStruct((2, 1, K, G, D), dtype)
  if is_int8:
    key = jax.eval_shape(quantize, key)
  return backends.choose("decode", BACKENDS, name, query, key).name


def test_the_platform_and_the_cache_choose_the_backend():
  assert choice() == "xla"
  with pytest.raises(ValueError, match="it needs a TPU"):
    choice(name="pallas_tpu")
  with jax.set_mesh(one("v5e")):
    assert choice() == choice(is_int8=True) == choice(G=2) == choice(D=64) == "pallas_tpu"
    assert choice(K=whole_length(1000)) == "pallas_tpu"
    assert choice(K=whole_length(1000, 16) // 16) == "pallas_tpu"
    for options, reason in (
      (dict(K=1000), "1000 cached positions are not a multiple of 128; allocate more"),
      (dict(D=64, is_int8=True), "it would copy a cache of 8 int8 heads of 64"),
      (dict(G=6), "it would copy a cache of 6 bfloat16 heads of 128"),
      (dict(G=2, D=256), "it would copy a cache of 2 bfloat16 heads of 256"),
      (dict(G=128), "128 key heads on one device overflow its vector memory; shard them"),
      (dict(dtype=jnp.float16), "TPUs have no float16"),
    ):
      assert choice(**options) == "xla"
      with pytest.raises(ValueError, match=reason):
        choice(name="pallas_tpu", **options)
