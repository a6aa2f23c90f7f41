"""One suite for every attention backend: values and gradients against a float64 judge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.triton import gpu_info

from kernels import attention as attention_lib
from kernels.attention import KeyIntervals, api, attention, xla
from tests.kernels import attention_cases
from tests.kernels.attention_cases import CASES

BACKENDS = ("reference", "xla")
# Largest error divided by the largest value. One operation rounds by 6e-8, 4e-3 and 5e-4.
TOLERANCES = {"float32": 3e-6, "bfloat16": 1.5e-2, "float16": 2e-3}
NAMES = ("out", "log_sum_exp", "query gradient", "key gradient", "value gradient")
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Gives every case several blocks, of sizes that divide few of the lengths."""
  monkeypatch.setattr(xla, "QUERY_BLOCK", 16)
  monkeypatch.setattr(xla, "KEY_BLOCK", 12)


@pytest.fixture(autouse=True)
def no_silent_broadcast():
  with jax.numpy_rank_promotion("raise"):
    yield


@functools.cache
def with_grads(backend, soft_cap=None):
  """A compiled function of `Case.arrays()` that returns what `judge` returns."""

  def run(query, key, value, intervals, out_cotangent, log_sum_exp_cotangent):
    def function(query, key, value):
      pairs = KeyIntervals(*intervals)
      return attention(query, key, value, pairs, soft_cap=soft_cap, backend=backend)

    results, pull_back = jax.vjp(function, query, key, value)
    return *results, *pull_back((out_cotangent, log_sum_exp_cotangent))

  return jax.jit(run)


def rounded(arrays, dtype):
  """The arrays in `dtype` (the last one float32), and the same values in float64."""
  as_dtype = [jnp.asarray(array, dtype) for array in arrays[:3]]
  as_dtype += [tuple(map(jnp.asarray, arrays[3])), jnp.asarray(arrays[4], dtype)]
  as_dtype.append(jnp.asarray(arrays[5], "float32"))
  return as_dtype, jax.tree.map(lambda array: np.asarray(array, "float64"), as_dtype)


def error(actual, expected):
  """Largest difference divided by the largest expected magnitude. Infinities must be equal."""
  actual = np.asarray(actual, "float64")
  is_finite = np.isfinite(expected)
  np.testing.assert_array_equal(actual[~is_finite], expected[~is_finite])
  return np.abs(actual[is_finite] - expected[is_finite]).max() / np.abs(expected[is_finite]).max()


def judged(arrays, soft_cap):
  intervals = tuple(array.astype(int) for array in arrays[3])
  return attention_cases.judge(*arrays[:3], intervals, *arrays[4:], soft_cap=soft_cap)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case, backend):
  arrays, exact = rounded(case.arrays(), "float32")
  expected = judged(exact, case.soft_cap)
  for name, array, wanted in zip(NAMES, with_grads(backend, case.soft_cap)(*arrays), expected):
    assert error(array, wanted) < TOLERANCES["float32"], name


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("packed", "empty_rows", "soft_cap"))
def test_half_precision(name, backend, dtype):
  case = BY_NAME[name]
  arrays, exact = rounded(case.arrays(), dtype)
  expected = judged(exact, case.soft_cap)
  actual = with_grads(backend, case.soft_cap)(*arrays)
  assert [array.dtype for array in actual] == [dtype, "float32", dtype, dtype, dtype]
  for name, array, wanted in zip(NAMES, actual, expected):
    assert error(array, wanted) < TOLERANCES[dtype], name


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_rows_are_exact(backend):
  case = BY_NAME["empty_rows"]
  arrays, _ = rounded(case.arrays(), "float32")
  start, stop = case.arrays()[3]
  is_empty = stop <= start
  out, log_sum_exp, query_grad, key_grad, value_grad = with_grads(backend, case.soft_cap)(*arrays)
  assert not np.asarray(out)[is_empty].any()
  assert (np.asarray(log_sum_exp)[is_empty] == -np.inf).all()
  assert not np.asarray(query_grad)[is_empty].any()
  # The last batch row attends to nothing.
  assert not np.asarray(key_grad)[-1].any() and not np.asarray(value_grad)[-1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
  case = BY_NAME["causal"]
  query, *rest = case.arrays()
  arrays, exact = rounded((query * 1e4, *rest), "float32")
  actual = with_grads(backend, case.soft_cap)(*arrays)
  out, log_sum_exp, *_ = judged(exact, None)
  assert all(np.isfinite(array).all() for array in actual)
  assert error(actual[1], log_sum_exp) < 1e-6
  assert error(actual[0], out) < 5e-3  # scores of 1e5 carry an absolute error of 1e-2


@functools.cache
def merged_with_grads(bounds):
  """What `judge` returns, merged from attention over the parts of the keys between `bounds`."""

  def run(query, key, value, intervals, *cotangents):
    def function(query, key, value):
      return attention_lib.merge(
        [
          attention(
            query,
            key[:, first:last],
            value[:, first:last],
            attention_lib.within(KeyIntervals(*intervals), first, last - first),
            backend="reference",
          )
          for first, last in zip(bounds, bounds[1:])
        ]
      )

    results, pull_back = jax.vjp(function, query, key, value)
    return *results, *pull_back(cotangents)

  return jax.jit(run)


@pytest.mark.parametrize("bounds", ((0, 37), (0, 8, 16, 24, 37)))
@pytest.mark.parametrize("name", ("causal", "packed", "empty_rows"))
def test_merge_of_partials_equals_the_whole(name, bounds):
  """Some or all partials are empty for some rows."""
  arrays, exact = rounded(BY_NAME[name].arrays(), "float32")
  for array, wanted in zip(merged_with_grads(bounds)(*arrays), judged(exact, None)):
    assert error(array, wanted) < TOLERANCES["float32"]


def test_merge_does_not_overflow():
  out = jnp.ones((1, 1, 1, 4))
  far = [(out, jnp.full((1, 1, 1), 3e38)), (3 * out, jnp.full((1, 1, 1), -3e38))]
  merged_out, log_sum_exp = attention_lib.merge(far)
  np.testing.assert_array_equal(merged_out, out)
  assert log_sum_exp == jnp.float32(3e38)


def test_interval_constructors():
  ids = attention_cases.segment_ids(4, 48)
  for actual, expected in zip(attention_lib.packed(ids), attention_cases.packed(4, 48, 48)):
    np.testing.assert_array_equal(actual, expected)
  for actual, expected in zip(attention_lib.causal(2, 7), attention_cases.causal(2, 7, 7)):
    np.testing.assert_array_equal(actual, expected)
  same = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, :, None] & np.tri(48, dtype=bool)
  np.testing.assert_array_equal(attention_lib.mask(attention_lib.packed(ids), 48), same)


@pytest.mark.parametrize("window", (1, 5, 48))
def test_windowed_intervals_keep_the_last_keys_of_each_document(window):
  ids = attention_cases.segment_ids(4, 48)
  intervals = attention_lib.windowed(attention_lib.packed(ids), window)
  query, key = np.arange(48)[:, None], np.arange(48)[None]
  same = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, :, None]
  seen = same & (query - window < key) & (key <= query)
  np.testing.assert_array_equal(attention_lib.mask(intervals, 48), seen)
  assert int(intervals.start_BxQ.min()) >= 0


@pytest.mark.parametrize(
  "change, message",
  (
    (dict(backend="fast"), "no attention backend 'fast'"),
    (dict(key=(2, 8, 3, 4), value=(2, 8, 3, 4)), "G divides H"),
    (dict(value=(2, 8, 2, 8)), "G divides H"),
    (dict(dtype="int32"), "cast them first"),
    (dict(intervals=9), r"shape \(2, 8\)"),
  ),
)
def test_what_is_not_supported_is_said_in_a_sentence(change, message):
  shapes = dict(query=(2, 8, 4, 4), key=(2, 8, 2, 4), value=(2, 8, 2, 4)) | {
    name: value for name, value in change.items() if name in ("key", "value")
  }
  arrays = [jnp.zeros(shape, change.get("dtype", "float32")) for shape in shapes.values()]
  with pytest.raises(ValueError, match=message) as raised:
    attention(
      *arrays, attention_lib.causal(2, change.get("intervals", 8)), backend=change.get("backend")
    )
  assert str(raised.value).count("\n") == 0


@pytest.mark.parametrize("kind", ("Quadro RTX 8000", "Tesla V100-SXM2-32GB"))
def test_a_gpu_that_pallas_has_no_name_for_takes_xla(kind, monkeypatch):
  """JAX raises an error for these names, which all predate Ampere."""
  monkeypatch.setattr(gpu_info, "get_device_platform", lambda: "gpu")
  monkeypatch.setattr(gpu_info, "get_device_kind", lambda: kind)
  query = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
  assert api.choose(None, query, query).name == "xla"
  with pytest.raises(ValueError, match="Hopper"):
    api.choose("mosaic_gpu", query, query)
