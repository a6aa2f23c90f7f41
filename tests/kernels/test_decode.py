"""Decode attention against the reference: blocks, layers, int8, and caches over eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from kernels.attention import KeyIntervals, attention
from kernels.decode import decode_attention, dequantize, quantize, write, xla
from tests.kernels import attention_cases

L, LAYER, B, K, D = 3, 1, 3, 52, 8


@pytest.fixture
def backend():
  """The backend under test. A module that imports these tests overrides it."""
  return xla.XLA


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
  monkeypatch.setattr(xla, "KEY_BLOCK", {"cpu": 16})


@pytest.fixture(autouse=True)
def no_silent_broadcast():
  with jax.numpy_rank_promotion("raise"):
    yield


def inputs(Q=1, H=4, G=2, dtype="float32", mask=attention_cases.decode, B=B, K=K, D=D):
  random = np.random.default_rng(0)
  query = jnp.asarray(random.standard_normal((B, Q, H, D)), dtype)
  key, value = (jnp.asarray(random.standard_normal((L, B, K, G, D)), dtype) for _ in range(2))
  return query, key, value, KeyIntervals(*map(jnp.asarray, mask(B, Q, K)))


def reference(query, key, value, intervals, soft_cap=None):
  exact = [array.astype("float32") for array in (query, key[LAYER], value[LAYER])]
  return attention(*exact, intervals, soft_cap=soft_cap, backend="reference")


def assert_close(actual, expected, tolerance):
  for array, wanted in zip(actual, expected, strict=True):
    array, wanted = np.asarray(array, "float32"), np.asarray(wanted)
    is_finite = np.isfinite(wanted)
    np.testing.assert_array_equal(array[~is_finite], wanted[~is_finite])
    np.testing.assert_allclose(array[is_finite], wanted[is_finite], rtol=0, atol=tolerance)


def some_empty(B, Q, K):
  start, stop = attention_cases.decode(B, Q, K)
  stop[1] = 0
  return start, stop


def short_windows(B, Q, K):
  """Each row sees a few keys in a different place; those of the last row are at the end."""
  stop = np.linspace(9, K, B, dtype=np.int32)[:, None] + np.zeros((1, Q), np.int32)
  return stop - 7, stop


# 16 query tokens are processed as a prompt.
@pytest.mark.parametrize("Q", (1, 3, 16))
@pytest.mark.parametrize(
  "H, G, dtype, tolerance",
  ((4, 4, "float32", 2e-6), (6, 1, "float32", 2e-6), (4, 2, "bfloat16", 1e-2)),
)
def test_equals_reference(Q, H, G, dtype, tolerance, backend):
  case = inputs(Q, H, G, dtype)
  function = functools.partial(decode_attention, backend=backend)
  actual = jax.jit(function)(*case, layer=jnp.int32(LAYER))
  assert actual[0].dtype == dtype and actual[1].dtype == jnp.float32
  assert_close(actual, reference(*case), tolerance)


@pytest.mark.parametrize("mask", (some_empty, short_windows))
@pytest.mark.parametrize("Q, soft_cap", ((2, None), (2, 1.5), (16, 1.5)))
def test_masks_and_soft_cap_equal_reference(mask, Q, soft_cap, backend):
  case = inputs(Q, mask=mask)
  actual = decode_attention(*case, layer=LAYER, soft_cap=soft_cap, backend=backend)
  assert_close(actual, reference(*case, soft_cap=soft_cap), 2e-6)


def test_only_splits_that_meet_an_interval_are_read(backend):
  """NaN fills the blocks that do not meet the row's interval; 0 * NaN would reach the output."""
  query, key, value, intervals = inputs(mask=short_windows)
  start, stop = map(np.asarray, intervals)
  split = np.arange(K)[None] // 16
  meets = (split >= start // 16) & (split <= (stop - 1) // 16)
  # The last block, for keys 48 to 51, starts at 36.
  meets[-1, 36:] = True
  assert 0 < meets.mean() < 0.6
  key, value = (jnp.where(meets[None, :, :, None, None], array, jnp.nan) for array in (key, value))
  actual = decode_attention(query, key, value, intervals, layer=LAYER, backend=backend)
  clean = (jnp.nan_to_num(array) for array in (key, value))
  assert_close(actual, reference(query, *clean, intervals), 2e-6)


@pytest.mark.parametrize("Q", (1, 16))
def test_int8_cache_is_within_its_bound(Q, backend):
  """Exact for the rounded numbers, which are off by at most 1/254 of the largest in a head."""
  query, key, value, intervals = inputs(Q)
  key, value = key.at[:, 0, :5].set(0.0), value * 30
  quantized = quantize(key), quantize(value)
  rounded = [dequantize(array, jnp.float32) for array in quantized]
  for array, exact in zip(rounded, (key, value)):
    bound = jnp.abs(exact).max(axis=-1, keepdims=True) / 254 * (1 + 1e-5)
    assert bool(jnp.all(jnp.abs(array - exact) <= bound))
  actual = decode_attention(query, *quantized, intervals, layer=LAYER, backend=backend)
  assert_close(actual, reference(query, *rounded, intervals), 1e-4)
  exact, _ = reference(query, key, value, intervals)
  # A value is off by 1/254, and a weight by e^(2 d) if a score is off by d, 2 / 254 * |q| * |k|.
  assert 1e-3 < np.abs(actual[0] - exact).max() / np.abs(exact).max() < 2e-2


def sharded(function, arguments, specs, out_specs, ring=2, ulysses=4):
  mesh = jax.make_mesh((ring, ulysses), ("ring", "ulysses"), (AxisType.Explicit,) * 2)
  with jax.set_mesh(mesh):
    placed = jax.tree.map(
      lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec)), arguments, specs
    )
    return jax.jit(jax.shard_map(function, in_specs=specs, out_specs=out_specs))(*placed)


CACHE = P(None, None, ("ring", "ulysses"))


@pytest.mark.parametrize(
  "mask, Q",
  ((attention_cases.decode, 1), (attention_cases.decode, 16), (some_empty, 3), (short_windows, 3)),
)
def test_a_cache_over_eight_devices_equals_the_whole(mask, Q, backend):
  query, key, value, intervals = inputs(Q, mask=mask)
  key, value = (array[:, :, :48] for array in (key, value))
  intervals = KeyIntervals(*(jnp.minimum(array, 48) for array in intervals))
  function = functools.partial(
    decode_attention, layer=LAYER, axis_names=("ring", "ulysses"), backend=backend
  )
  arguments = query, key, value, intervals
  actual = sharded(function, arguments, (P(), CACHE, CACHE, KeyIntervals(P(), P())), (P(), P()))
  assert_close(actual, reference(*arguments), 2e-6)


@pytest.mark.parametrize("position, Q", ((0, 1), (30, 1), (47, 1), (4, 3), (3, 20), (0, 48)))
def test_a_write_reaches_the_devices_that_hold_it(position, Q):
  cache = jnp.arange(L * B * 48, dtype=jnp.float32).reshape(L, B, 48, 1, 1)
  new = -1.0 - jnp.arange(B * Q, dtype=jnp.float32).reshape(B, Q, 1, 1)
  expected = np.array(cache)
  expected[LAYER, :, position : position + Q] = new
  np.testing.assert_array_equal(write(cache, new, LAYER, position), expected)

  def on_device(cache, new, position):
    return write(cache, new, LAYER, position, ("ring", "ulysses"))

  actual = sharded(on_device, (cache, new, jnp.int32(position)), (CACHE, P(), P()), CACHE)
  np.testing.assert_array_equal(actual, expected)


def striped(cache, stripe):
  """The columns in the order in which eight devices hold them."""
  order = np.arange(cache.shape[2]).reshape(-1, 8, stripe).swapaxes(0, 1).reshape(-1)
  return cache[:, :, order]


@pytest.mark.parametrize("stripe", (1, 2, 3))
def test_stripes_are_dealt_out_in_turn(stripe):
  """Rows that begin at their own positions, and write their own numbers of tokens."""
  query, key, value, intervals = inputs(3, mask=short_windows)
  key, value = (array[:, :, :48] for array in (key, value))
  intervals = KeyIntervals(*(jnp.minimum(array, 48) for array in intervals))
  Q = 11
  new = jnp.asarray(np.random.default_rng(1).standard_normal((B, Q, 2, D)), jnp.float32)
  position, count = np.linspace(0, 37, B, dtype=np.int32), np.linspace(Q, 0, B, dtype=np.int32)
  expected = np.array(key)
  for row in range(B):
    written = slice(position[row], position[row] + count[row])
    expected[LAYER, row, written] = new[row, : count[row]]

  def on_device(query, key, value, intervals, new, position, count):
    axes = "ring", "ulysses"
    key = write(key, new, LAYER, position, axes, stripe=stripe, count_B=count)
    options = dict(layer=LAYER, axis_names=axes, stripe=stripe)
    whole = decode_attention(query, key, value, intervals, **options)
    return (
      key,
      whole,
      decode_attention(
        query[:, :1].repeat(8, 1),
        key,
        value,
        KeyIntervals(*(bound[:, :1].repeat(8, 1) for bound in intervals)),
        query_axes=axes,
        **options,
      ),
    )

  specs = P(), CACHE, CACHE, KeyIntervals(P(), P()), P(), P(), P()
  parts = P(None, ("ring", "ulysses"))
  actual, whole, divided = sharded(
    on_device,
    (query, striped(key, stripe), striped(value, stripe), intervals, new, position, count),
    specs,
    (CACHE, (P(), P()), (parts, parts)),
  )
  np.testing.assert_array_equal(actual, striped(expected, stripe))
  exact = reference(query, jnp.asarray(expected), value, intervals)
  assert_close(whole, exact, 2e-6)
  # Each device gets its part of the queries.
  assert_close(divided, [array[:, :1].repeat(8, 1) for array in exact], 2e-6)


def test_decoding_copies_no_layer_of_the_cache():
  """The memory of a step, apart from the cache, does not grow with the cache."""

  def step(query, key, value, new, layer, position):
    key, value = (write(cache, new, layer, position) for cache in (key, value))
    start = jnp.zeros((B, 1), jnp.int32)
    intervals = KeyIntervals(start, start + position + 1)
    return decode_attention(query, key, value, intervals, layer=layer)[0], key, value

  def temporary_bytes(length):
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    cache = array(L, B, length, 2, D)
    compiled = (
      jax.jit(step, donate_argnums=(1, 2))
      .lower(array(B, 1, 4, D), cache, cache, array(B, 1, 2, D), scalar, scalar)
      .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary_bytes(1 << 20) == temporary_bytes(1 << 14)


def test_an_unknown_backend_is_refused():
  with pytest.raises(ValueError, match="use one of \\[.*'xla'\\]"):
    decode_attention(*inputs(), backend="fast")
