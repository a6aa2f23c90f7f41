"""The TPU kernels of the grouped product compile for real TPUs, without a TPU."""

import jax
import jax.numpy as jnp
import pytest

from kernels.experts import choose, grouped_matmul
from tests.kernels.compile_for_tpu import compiled, one


def shapes(K=4096, N=1536, E=8, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct((3000, K), dtype), jax.ShapeDtypeStruct((E, K, N), dtype)


@pytest.mark.parametrize(
  "generation, dtype", (("v5p", "bfloat16"), ("v6e", "float32"), ("tpu7x", "bfloat16"))
)
def test_compiles_forward_and_backward(generation, dtype):
  x, weight = shapes(dtype=dtype)

  def run(x, weight, sizes, cotangent):
    out, pull_back = jax.vjp(lambda x, weight: grouped_matmul(x, weight, sizes), x, weight)
    return out, *pull_back(cotangent)

  program = compiled(
    run,
    one(generation),
    x,
    weight,
    jax.ShapeDtypeStruct((8,), jnp.int32),
    jax.ShapeDtypeStruct((3000, 1536), dtype),
  )
  text = program.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  # Nothing is as large as one product per expert.
  assert program.memory_analysis().temp_size_in_bytes < 2 * weight.size * weight.dtype.itemsize


def test_the_platform_and_the_shapes_choose_the_backend():
  assert choose(None, *shapes()).name == "xla"
  with jax.set_mesh(one("v5p")):
    assert choose(None, *shapes()).name == "pallas_tpu"
    assert choose(None, *shapes(N=1408 - 64)).name == "ragged_dot"
    with pytest.raises(ValueError, match="multiples of 128, not 4096 and 1344"):
      choose("pallas_tpu", *shapes(N=1344))
