"""The TPU kernel compiles for real TPUs, without a TPU, and reads the codes in place."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from kernels import backends
from kernels.quantised_matmul import GRIDS, quantised_matmul
from kernels.quantised_matmul.api import BACKENDS
from tests.kernels.compile_for_tpu import TOPOLOGIES, compiled, one
from tests.kernels.test_quantised_matmul import zeros

L = 4


def shapes(K, N, name):
  return jax.eval_shape(lambda: zeros(L, K, N, GRIDS[name]))


@pytest.mark.parametrize(
  "generation, name",
  (
    *itertools.product(TOPOLOGIES, ("int8", "int4")),
    ("v5e", "int8_32"),
    ("v5p", "int4_64"),
    ("v6e", "int4_128"),
    ("v6e", "int4_symmetric"),
  ),
)
def test_compiles_and_copies_no_codes(generation, name):
  K, N = 4096, 11008
  x = jax.ShapeDtypeStruct((1, K), jnp.bfloat16)
  program = compiled(
    lambda x, matrix, layer: quantised_matmul(x, matrix, layer=layer),
    one(generation),
    x,
    shapes(K, N, name),
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  memory = program.memory_analysis()
  bits = GRIDS[name].bits
  assert "quantised_matmul" in program.as_text()
  assert memory.argument_size_in_bytes > L * K * N * bits / 8
  # Not even the scales are copied.
  assert memory.temp_size_in_bytes < 2**22


def choice(rows=1, K=4096, N=1024, dtype=jnp.bfloat16, name="int8", backend=None):
  x = jax.ShapeDtypeStruct((rows, K), dtype)
  return backends.choose("quantized product", BACKENDS, backend, x, shapes(K, N, name)).name


def test_the_platform_and_the_matrix_choose_the_backend():
  assert choice() == "xla"
  with pytest.raises(ValueError, match="it needs a TPU"):
    choice(backend="pallas_tpu")
  with jax.set_mesh(one("v5e")):
    assert choice() == choice(name="int4_128") == choice(K=576, N=49152) == "pallas_tpu"
    for options, reason in (
      (dict(rows=129), "it takes up to 128 rows, not 129"),
      (dict(K=72), "72 inputs are not whole groups in a multiple of 32 rows of codes"),
      (dict(rows=128, K=1 << 15), "128 rows of 32768 inputs overflow its vector memory"),
      (dict(dtype=jnp.float16), "TPUs have no float16"),
    ):
      assert choice(**options) == "xla"
      with pytest.raises(ValueError, match=reason):
        choice(backend="pallas_tpu", **options)
