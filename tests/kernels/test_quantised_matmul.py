"""Quantized products against the reference, and the grids against GGUF's own implementation."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.quantised_matmul import (
  GRIDS,
  QuantizedMatrix,
  columns,
  dequantize,
  quantised_matmul,
  quantize,
  reference,
  xla,
)

L, LAYER, K, N = 2, 1, 256, 320


@pytest.fixture
def backend():
  """The backend under test. A module that imports these tests overrides it."""
  return xla.XLA


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Three blocks of 128 outputs, the last of which starts earlier."""
  monkeypatch.setattr(xla, "BLOCK_WEIGHTS", {"cpu": 128 * K})


@pytest.fixture(autouse=True)
def no_silent_broadcast():
  with jax.numpy_rank_promotion("raise"):
    yield


def weights(L=L, K=K, N=N):
  """Rows of very different size, one of them zero, and scales that are subnormal in float16."""
  random = np.random.default_rng(0)
  weight = random.standard_normal((L, K, N)).astype(np.float32)
  weight *= np.exp(random.uniform(-12, 2, (L, 1, N))).astype(np.float32)
  weight[:, :, 7] = 0
  return weight


def matrix(weight_LxKxN, grid):
  layers = zip(*(quantize(weight_KxN, grid) for weight_KxN in weight_LxKxN))
  return QuantizedMatrix(grid, *(jnp.asarray(np.stack(arrays)) for arrays in layers))


def rows(shape, dtype="float32"):
  return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def relative_error(actual, expected):
  """The largest error of an output, as a share of the largest of that output's magnitudes."""
  scale = np.abs(expected).max(axis=0, keepdims=True)
  return (np.abs(actual - expected) / np.where(scale == 0, 1, scale)).max()


@pytest.mark.parametrize("dtype, tolerance", (("float32", 1e-5), ("bfloat16", 2e-2)))
@pytest.mark.parametrize("name", GRIDS)
def test_equals_reference(name, dtype, tolerance, backend):
  quantized, x = matrix(weights(), GRIDS[name]), rows((5, K), dtype)
  out = quantised_matmul(x, quantized, layer=jnp.int32(LAYER), backend=backend)
  assert out.dtype == jnp.float32
  expected = reference.quantised_matmul(x, quantized, LAYER)
  assert relative_error(np.asarray(out), np.asarray(expected)) < tolerance


def test_leading_axes_of_x_are_kept(backend):
  quantized, x = matrix(weights(), GRIDS["int8"]), rows((2, 3, K))
  out = quantised_matmul(x, quantized, layer=LAYER, backend=backend)
  expected = reference.quantised_matmul(x.reshape(6, K), quantized, LAYER)
  assert out.shape == (2, 3, N)
  assert relative_error(np.asarray(out.reshape(6, N)), np.asarray(expected)) < 1e-5


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_is_to_the_nearest(name):
  """Within half a step, except where 4 bits lack the code 8, and scales are rounded to float16."""
  grid, weight = GRIDS[name], weights()
  group = weight.reshape(L, -1, grid.group or K, N)
  largest = np.abs(group).max(axis=2, keepdims=True)
  error = np.abs(np.asarray(dequantize(matrix(weight, grid))).reshape(group.shape) - group)
  steps = 127 if grid.bits == 8 else 8
  bound = largest / steps * (0.5 if grid.bits == 8 else 1)
  if grid.has_minimums:
    steps, bound = 15, np.ptp(group, axis=2, keepdims=True) / 15 * 0.5
  if grid.group:
    # A step of float16 is 2^-11 of the scale, or 2^-25 if it is subnormal.
    bound += ((1 + grid.has_minimums) * (2 * largest * 2.0**-11 + steps * 2.0**-25)) * 1.01
  assert np.all(error <= bound * (1 + 1e-5))
  assert np.median(error[largest.repeat(error.shape[2], 2) > 0.1]) > 0


@pytest.mark.parametrize(
  "name, kind", (("int8_32", "Q8_0"), ("int4_symmetric", "Q4_0"), ("int4", "Q4_1"))
)
def test_groups_of_32_are_ggufs_bytes(name, kind):
  """Scales and codes, and the numbers that they stand for."""
  grid, kind = GRIDS[name], gguf.GGMLQuantizationType[kind]
  weight = weights()[0]
  stored = gguf.quants.quantize(np.ascontiguousarray(weight.T), kind)
  blocks = stored.reshape(N, K // 32, -1)
  codes, *coefficients = quantize(weight, grid)
  for index, coefficient in enumerate(coefficients):
    halves = blocks[..., 2 * index : 2 * index + 2].copy().view(np.int16)[..., 0]
    np.testing.assert_array_equal(halves, coefficient.T)
  bytes_of_block = codes.T.reshape(N, K // 32, -1).view(np.uint8)
  if kind.name == "Q4_0":
    bytes_of_block = bytes_of_block ^ 0x88  # Two's complement, and code + 8.
  np.testing.assert_array_equal(blocks[..., 2 * len(coefficients) :], bytes_of_block)
  one_layer = (jnp.asarray(array)[None] for array in (codes, *coefficients))
  numbers = dequantize(QuantizedMatrix(grid, *one_layer))[0]
  np.testing.assert_array_equal(gguf.quants.dequantize(stored, kind).T, numbers)


@pytest.mark.parametrize("name", GRIDS)
def test_numbers_of_a_grid_stay(name):
  """Quantizing what was quantized changes nothing, so a model may be written as GGUF and read."""
  grid = GRIDS[name]
  once = dequantize(matrix(weights(), grid))
  again = dequantize(matrix(np.asarray(once), grid))
  if grid.group is None:
    # A scale in float32 may change by its last bit.
    np.testing.assert_allclose(again, once, rtol=3e-7)
  elif not grid.has_minimums:
    np.testing.assert_array_equal(again, once)
  else:
    # A minimum much larger than the scale hides bits of the scale.
    largest = np.abs(once).max(axis=(0, 1))
    assert (np.abs(again - once).max(axis=(0, 1)) <= 1e-3 * largest).all()


@pytest.mark.parametrize("name", ("int8", "int4"))
def test_columns_are_rows_of_an_embedding(name):
  quantized = matrix(weights(L=1), GRIDS[name])
  index = jnp.asarray([[3, N - 1], [-1, N]], jnp.int32)
  taken, whole = np.asarray(columns(quantized, index)), np.asarray(dequantize(quantized))[0]
  np.testing.assert_array_equal(taken[0], whole[:, [3, N - 1]].T)
  assert taken.shape == (2, 2, K) and not taken[1].any()


@pytest.mark.parametrize("name, bits", (("int8", 8), ("int8_32", 8.5), ("int4", 5)))
def test_memory_is_that_of_the_codes(name, bits, monkeypatch):
  """A product in a loop over layers never makes a float copy of a matrix, or a copy of a layer."""
  monkeypatch.undo()
  L, K, N, grid = 3, 2048, 4096, GRIDS[name]
  shapes = jax.eval_shape(lambda: zeros(L, K, N, grid))

  def step(x, matrix):
    def layer(x, index):
      return x + quantised_matmul(x, matrix, layer=index).astype(x.dtype)[:, :K], None

    return jax.lax.scan(layer, x, jnp.arange(L))[0]

  memory = (
    jax.jit(step).lower(jax.ShapeDtypeStruct((1, K), jnp.float32), shapes).compile()
  ).memory_analysis()
  scales = 4 * L * N if grid.group is None else 0
  assert memory.argument_size_in_bytes == L * K * N * bits / 8 + scales + 4 * K
  block = 4 * xla.BLOCK_WEIGHTS["cpu"]
  assert memory.temp_size_in_bytes < 4 * block < K * N


def zeros(L, K, N, grid):
  """A matrix of zeros."""
  groups = K // grid.group if grid.group else 1
  scales = jnp.zeros((L, groups, N), jnp.int16 if grid.group else jnp.float32)
  codes = jnp.zeros((L, K * grid.bits // 8, N), jnp.int8)
  return QuantizedMatrix(grid, codes, scales, scales if grid.has_minimums else None)


def test_an_unknown_backend_is_refused():
  with pytest.raises(ValueError, match="use one of \\[.*'xla'\\]"):
    quantised_matmul(rows((1, K)), matrix(weights(), GRIDS["int8"]), backend="fast")
