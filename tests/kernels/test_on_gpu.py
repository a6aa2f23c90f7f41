"""The compiled kernels on a real NVIDIA GPU, against the judges of the other suites.

    JAX_PLATFORMS=cuda python -m pytest tests/kernels/test_on_gpu.py

Elsewhere these tests are skipped: there, interpreters run the same kernels. Only a GPU shows what
layouts, registers and matrix instructions do.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attention, packed
from kernels.attention.mosaic_gpu import MOSAIC_GPU
from kernels.attention.triton import TRITON
from kernels.decode import decode_attention, dequantize, quantize
from tests.kernels import (
  attention_cases,
  test_attention as attention_suite,
  test_decode as decode_suite,
  test_grouped_matmul as grouped_suite,
)
from tests.kernels.attention_cases import Case

pytestmark = pytest.mark.skipif(
  os.environ["JAX_PLATFORMS"] != "cuda", reason="needs an NVIDIA GPU and JAX_PLATFORMS=cuda"
)
BACKENDS = {backend.name: backend for backend in (TRITON, MOSAIC_GPU)}
# Lengths that no block size divides.
SHAPE = dict(B=2, Q=331, K=331, H=4, G=2)
CASES = (
  Case("causal", attention_cases.causal, **SHAPE),
  Case("packed", attention_cases.packed, **SHAPE),
  Case("sliding_window", attention_cases.sliding_window, **SHAPE),
  Case("frames", attention_cases.frames, **SHAPE),
  Case("empty_rows", attention_cases.empty_rows, **SHAPE),
  Case("multi_query", attention_cases.packed, **(SHAPE | dict(H=3, G=1))),
  Case("fewer_queries", attention_cases.bidirectional, **(SHAPE | dict(Q=70))),
  Case("one_token", attention_cases.causal, B=1, Q=1, K=1),
  Case("soft_cap", attention_cases.packed, **SHAPE, soft_cap=1.5),
)


@pytest.fixture(autouse=True)
def exact_products():
  """XLA multiplies float32 as TensorFloat-32 by default, also in the judges that it runs."""
  with jax.default_matmul_precision("highest"):
    yield


def skip_unless_supported(backend, *arrays):
  """Older GPUs do not run every backend, and a backend does not take every dtype."""
  if reason := BACKENDS[backend].unsupported(*arrays):
    pytest.skip(reason)


@pytest.mark.parametrize("dtype", attention_suite.TOLERANCES)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_and_gradients(case, backend, head_dim, dtype):
  arrays, exact = attention_suite.rounded(dataclasses.replace(case, D=head_dim).arrays(), dtype)
  skip_unless_supported(backend, *arrays[:2])
  actual = attention_suite.with_grads(backend, case.soft_cap)(*arrays)
  expected = attention_suite.judged(exact, case.soft_cap)
  tolerance = attention_suite.TOLERANCES[dtype]
  if case.name == "one_token" and dtype == "float32":
    tolerance = 2e-5  # The gradient of the query is a difference of two equal sums over head_dim.
  for name, array, wanted in zip(attention_suite.NAMES, actual, expected):
    assert attention_suite.error(array, wanted) < tolerance, name


def documents(length):
  """Packed documents of uneven lengths, and padding."""
  ends = np.cumsum(np.random.default_rng(0).integers(1, length // 4, 12))
  ids = np.searchsorted(ends, np.arange(length), side="right") + 1
  return jnp.asarray(np.where(np.arange(length) < length - 77, ids, 0)[None], jnp.int32)


@pytest.mark.parametrize("mask", ("causal", "documents"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_attention_equals_the_reference_and_repeats(backend, mask):
  """Thousands of programs run at once. A race would change the bits from run to run."""
  S, H, G, D = 4096 + 40, 8, 2, 128
  random = np.random.default_rng(0)
  shapes = (1, S, H, D), (1, S, G, D), (1, S, G, D)
  arrays = [jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes]
  skip_unless_supported(backend, *arrays[:2])
  ids = documents(S) if mask == "documents" else jnp.ones((1, S), jnp.int32)
  cotangents = random.standard_normal(shapes[0]), random.standard_normal(shapes[0][:3])

  @functools.partial(jax.jit, static_argnums=0)
  def run(name, *arrays):
    dtype = arrays[0].dtype
    function = functools.partial(attention, intervals=packed(ids), backend=name)
    results, pull_back = jax.vjp(function, *arrays)
    exact = jnp.asarray(cotangents[0], jnp.bfloat16).astype(dtype)
    return *results, *pull_back((exact, jnp.asarray(cotangents[1], jnp.float32)))

  expected = run("reference", *(array.astype(jnp.float32) for array in arrays))
  first = run(backend, *arrays)
  for name, array, wanted in zip(attention_suite.NAMES, first, expected):
    assert attention_suite.error(array, np.asarray(wanted)) < 1.5e-2, name
  for _ in range(5):
    jax.tree.map(np.testing.assert_array_equal, run(backend, *arrays), first)


@pytest.mark.parametrize(
  "mask", (attention_cases.decode, decode_suite.some_empty, decode_suite.short_windows)
)
@pytest.mark.parametrize("is_int8", (False, True))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_decode(dtype, head_dim, is_int8, mask):
  """Queries of one, three and eight tokens to caches of several splits."""
  for Q, H, G in ((1, 4, 4), (3, 6, 1), (8, 8, 2)):
    query, key, value, intervals = decode_suite.inputs(
      Q, H, G, dtype, mask=mask, K=3001, D=head_dim
    )
    rounded = key, value
    if is_int8:
      key, value = quantize(key), quantize(value)
      rounded = [dequantize(array, jnp.float32) for array in (key, value)]
    function = jax.jit(functools.partial(decode_attention, backend="triton"))
    actual = function(query, key, value, intervals, layer=jnp.int32(decode_suite.LAYER))
    # Results are up to 3, where bfloat16 rounds by up to 8e-3.
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
    decode_suite.assert_close(actual, decode_suite.reference(query, *rounded, intervals), tolerance)


GROUPS = grouped_suite.CASES | {"large": ([300, 0, 5, 129, 1000, 0, 128], 77)}


@pytest.mark.parametrize("dtype", grouped_suite.TOLERANCES)
@pytest.mark.parametrize("shape", ((64, 192), (448, 128), (512, 768)))
@pytest.mark.parametrize("case", GROUPS)
def test_grouped_products_and_gradients(case, shape, dtype, monkeypatch):
  monkeypatch.setattr(grouped_suite, "CASES", GROUPS)
  monkeypatch.setattr(grouped_suite, "K", shape[0])
  monkeypatch.setattr(grouped_suite, "N", shape[1])
  grouped_suite.arrays.cache_clear()
  grouped_suite.judged.cache_clear()
  grouped_suite.test_values_and_gradients(case, dtype, "triton")
