"""The suite of `test_decode` on the Triton kernel, in Triton's interpreter."""

# isort: off
from tests.kernels import triton_interpreter  # First: it chooses the interpreter.
# isort: on

import types

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
import pytest

from kernels import benchmarks, nvidia
from kernels.attention import KeyIntervals, reference as attention_reference
from kernels.attention.triton.block_sizes import Blocks, decode_programs, decode_splits
from kernels.benchmarks import timing
from kernels.decode import api, decode_attention, dequantize, quantize
from kernels.decode.triton import backend as triton_backend, kernel
from tests.kernels import attention_cases
from tests.kernels.test_decode import (
  LAYER,
  assert_close,
  inputs,
  no_silent_broadcast,
  reference,
  short_windows,
  test_a_cache_over_eight_devices_equals_the_whole,
  test_equals_reference,
  test_int8_cache_is_within_its_bound,
  test_masks_and_soft_cap_equal_reference,
  test_only_splits_that_meet_an_interval_are_read,
)

SPLITS = 3


@pytest.fixture
def backend():
  return triton_backend.TRITON


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Makes blocks and splits so small that a cache of 52 positions has several of both."""
  monkeypatch.setattr(jax_triton, "triton_call", triton_interpreter.triton_call)
  monkeypatch.setattr(triton_backend, "_sizes", lambda *_: (Blocks(16, 8, 4, 2), SPLITS))


def test_rows_beyond_one_block_of_them(backend):
  """Eight query tokens of a group of six heads are 48 rows in three programs; one sees nothing.

  The rows of that token collect the blocks that are full for the others.
  """

  def one_empty(B, Q, K):
    start, stop = attention_cases.decode(B, Q, K)
    stop[:, 3] = 0
    return start, stop

  case = inputs(8, H=6, G=1, mask=one_empty)
  assert_close(decode_attention(*case, layer=LAYER, backend=backend), reference(*case), 2e-6)


@pytest.mark.parametrize("dtype, tolerance", (("bfloat16", 2e-2), ("float16", 3e-3)))
def test_int8_cache_in_half_precision(backend, dtype, tolerance):
  query, key, value, intervals = inputs(3, dtype=dtype)
  quantized = quantize(key), quantize(value)
  actual = decode_attention(query, *quantized, intervals, layer=LAYER, backend=backend)
  rounded = (dequantize(array, jnp.float32) for array in quantized)
  assert actual[0].dtype == dtype
  assert_close(actual, reference(query, *rounded, intervals), tolerance)


@pytest.mark.parametrize("is_quantized", (False, True))
def test_no_key_outside_the_intervals_is_read(backend, is_quantized):
  """Positions that are not yet written may hold anything."""
  query, key, value, intervals = inputs(mask=short_windows)
  expected = reference(query, key, value, intervals)
  start, stop = map(np.asarray, intervals)
  index = np.arange(key.shape[2])[None]
  is_seen = jnp.asarray((index >= start) & (index < stop))[None, :, :, None]
  key, value = map(quantize, (key, value)) if is_quantized else (key, value)

  def spoil(array):
    is_kept = is_seen.reshape(is_seen.shape + (1,) * (array.ndim - 4))
    return array if array.dtype == jnp.int8 else jnp.where(is_kept, array, jnp.nan)

  key, value = jax.tree.map(spoil, (key, value))
  actual = decode_attention(query, key, value, intervals, layer=LAYER, backend=backend)
  assert_close(actual, expected, 5e-2 if is_quantized else 2e-6)


def test_a_cache_of_more_than_two_to_the_31_elements():
  """NumPy only reserves memory that is never written or read."""
  K, D = 1 << 27, 16
  key = np.zeros((2, 1, K, 1, D), np.int8)
  scale = np.zeros((2, 1, K, 1), np.float32)
  key[1, 0, -4:], scale[1, 0, -4:] = np.arange(-32, 32).reshape(4, 1, D), 0.1
  query = np.ones((1, 1, 2, D), np.float32)
  stop = np.full((1, 1), K, np.int32)
  options = dict(GROUP=2, HEAD_DIM=D, ROW_BLOCK=16, KEY_BLOCK=8, IS_QUANTIZED=True, PRECISION=None)
  results = triton_interpreter.triton_call(
    *(query, key, key, scale, scale, np.ones(1, np.int32), stop - 4, stop, 1, K, 1),
    kernel=kernel.partial,
    out_type=(jax.ShapeDtypeStruct((1, 1, 1, 2, D), "float32"),) * 2,
    grid=(1, 1, 1),
    num_warps=4,
    num_stages=1,
    backend_options={},
    SCALE=1.0,
    SOFT_CAP=None,
    **options,
  )
  exact = jnp.asarray(key[1, :, -4:] * np.float32(0.1))
  whole = KeyIntervals(*(jnp.full((1, 1), i, jnp.int32) for i in (0, 4)))
  expected, _ = attention_reference.attention(query, exact, exact, whole, scale=1.0, soft_cap=None)
  np.testing.assert_allclose(results[0][0], expected, atol=1e-5)


def test_work_is_spread_over_the_splits_wherever_it_lies(backend, monkeypatch):
  """Counts products by program. Each batch row sees one or two blocks of eight keys."""
  blocks = []
  load = triton_interpreter.interpreter.InterpreterBuilder.create_dot

  def counting(self, *args):
    blocks.append(tuple(self.grid_idx))
    return load(self, *args)

  monkeypatch.setattr(triton_interpreter.interpreter.InterpreterBuilder, "create_dot", counting)
  query, key, value, intervals = inputs(H=2, G=1, mask=short_windows)
  decode_attention(query, key, value, intervals, layer=LAYER, backend=backend)
  start, stop = map(np.asarray, intervals)
  needed = int(((stop + 7) // 8 - start // 8).sum())
  assert len(blocks) == 2 * needed
  assert max(blocks.count(program) for program in blocks) == 2


@pytest.mark.slow
def test_its_sizes_are_measured(monkeypatch):
  """The tuner's candidates reach the kernel and its grid. Times mean nothing here."""
  monkeypatch.undo()  # The sizes of all other tests.
  grids = []

  def triton_call(*args, grid, **options):
    grids.append((options["KEY_BLOCK"], options["IS_QUANTIZED"], grid))
    return triton_interpreter.triton_call(*args, grid=grid, **options)

  monkeypatch.setattr(jax_triton, "triton_call", triton_call)
  monkeypatch.setattr(timing, "SECONDS_PER_ROUND", 0.0)
  monkeypatch.setattr(timing, "ROUNDS", 1)
  hopper = types.SimpleNamespace(compute_capability=90)
  monkeypatch.setattr(nvidia.pallas_triton, "get_gpu_info", lambda: hopper)
  here = triton_backend.TRITON._replace(unsupported=lambda *_: None)
  monkeypatch.setattr(api, "BACKENDS", (here,))
  caches = [benchmarks.Cache(128, 2, 1, 64, "float32", is_int8) for is_int8 in (False, True)]
  blocks = [Blocks(16, 8, 4, 2), Blocks(16, 16, 4, 2)]
  candidates = {"decode": blocks, "decode_int8": blocks[:1], "decode_programs": [2]}
  candidates = {("decode", "triton"): candidates}
  records = list(benchmarks.measure_sizes([], caches, candidates=candidates))
  kernels = ["decode", "decode_programs", "decode_int8", "decode_programs"]
  assert [record["kernel"] for record in records] == kernels
  assert all(not record["failed"] for record in records), records
  # A split has at least four blocks: of 8 keys, of 16, or of the table's 64.
  expected = {(8, False, 4), (16, False, 2), (64, False, 1), (8, True, 4), (64, True, 1)}
  assert {(key_block, is_int8, grid[1]) for key_block, is_int8, grid in grids} == expected


def test_splits_fill_a_gpu_but_are_not_too_short():
  programs = decode_programs(90)
  assert 8 * decode_splits(programs, 8, 1 << 14) >= 8 * 132
  assert decode_splits(programs, 8 * 1024, 1 << 14) == 1
  assert decode_splits(programs, 8, 40) == 10
  assert decode_splits(programs, 8, 1) == 1


def test_what_is_not_supported_is_said():
  query, key, _, _ = inputs()
  assert "NVIDIA GPU" in triton_backend.unsupported(query, key)
