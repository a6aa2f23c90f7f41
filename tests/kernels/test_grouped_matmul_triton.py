"""The suite of `test_grouped_matmul` on the Triton kernels, in Triton's interpreter."""

# isort: off
from tests.kernels import triton_interpreter  # First: it chooses the interpreter.
# isort: on

import jax.numpy as jnp
import jax_triton
import numpy as np
import pytest

from kernels.experts.triton import TRITON, backend as triton_backend
from kernels.experts.triton.backend import Blocks
from tests.kernels import test_grouped_matmul as suite
from tests.kernels.test_grouped_matmul import no_silent_broadcast


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Two blocks of inputs, three of outputs, several of rows, and bands that are not full."""
  monkeypatch.setattr(suite, "K", 32)
  monkeypatch.setattr(suite, "N", 48)
  suite.arrays.cache_clear()
  suite.judged.cache_clear()
  monkeypatch.setattr(jax_triton, "triton_call", triton_interpreter.triton_call)
  monkeypatch.setattr(triton_backend, "blocks_for", lambda *_: (Blocks(16, 16, 16, 4, 2),) * 2)
  yield
  suite.arrays.cache_clear()
  suite.judged.cache_clear()


@pytest.mark.parametrize("dtype", suite.TOLERANCES)
@pytest.mark.parametrize("case", suite.CASES)
def test_values_and_gradients(case, dtype):
  suite.test_values_and_gradients(case, dtype, TRITON)


@pytest.mark.slow
def test_rows_of_other_groups_are_not_read():
  """Rows after the last group may hold anything."""
  x, weight, sizes, _ = suite.arrays("skewed", "float32")
  spoilt = x.at[-1].set(jnp.nan)
  y = jnp.ones((x.shape[0], weight.shape[2]), x.dtype).at[-1].set(jnp.nan)
  out = triton_backend.product(spoilt, weight, sizes, transposed=False)
  np.testing.assert_array_equal(out, triton_backend.product(x, weight, sizes, transposed=False))
  assert np.isfinite(triton_backend.outer(spoilt, y, sizes)).all()


def test_blocks_divide_the_matrices(monkeypatch):
  monkeypatch.undo()
  monkeypatch.setattr(triton_backend, "compute_capability", lambda: 90)
  for of_product, of_outer in (
    triton_backend._blocks(jnp.bfloat16, K, N) for K in (64, 192, 4096) for N in (64, 448, 14336)
  ):
    assert of_product.rows == 128 and of_outer.rows == 64
  of_product, of_outer = triton_backend._blocks(jnp.bfloat16, 192, 448)
  assert (of_product.inputs, of_product.outputs) == (64, 64)
  assert (of_outer.inputs, of_outer.outputs) == (64, 64)


def test_what_is_not_supported_is_said():
  x, weight, _, _ = suite.arrays("equal", "float32")
  assert "NVIDIA GPU" in triton_backend.unsupported(x, weight)
