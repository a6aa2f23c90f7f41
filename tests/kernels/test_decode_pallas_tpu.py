"""The suite of `test_decode` on the TPU kernel, in Pallas's TPU interpreter on a CPU.

`test_attention_pallas_tpu` says what the interpreter finds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec as P

from kernels.attention import KeyIntervals
from kernels.attention.pallas_tpu import parts
from kernels.decode import decode_attention, dequantize, quantize
from kernels.decode.pallas_tpu import PALLAS_TPU, backend as decode_backend, layouts
from tests.kernels import test_decode
from tests.kernels.test_decode import (
  LAYER,
  assert_close,
  no_silent_broadcast,
  reference,
  short_windows,
  test_equals_reference,
  test_int8_cache_is_within_its_bound,
  test_masks_and_soft_cap_equal_reference,
)

# Three blocks of 128 positions, the smallest that a TPU's lanes allow.
inputs = functools.partial(test_decode.inputs, B=2, K=384, D=128)
decode = functools.partial(decode_attention, layer=LAYER, backend=PALLAS_TPU)


@pytest.fixture
def backend():
  return PALLAS_TPU


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
  """Blocks of 128 positions, in parts of 128 rows."""
  monkeypatch.setattr(decode_backend, "DECODE_BLOCK_BYTES", 1)
  monkeypatch.setattr(layouts, "DECODE_COLUMNS", 128)
  monkeypatch.setattr(test_decode, "inputs", inputs)


@pytest.fixture(autouse=True)
def interpreter():
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(random_seed=0)):
    yield
  pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.slow
@pytest.mark.parametrize("H, G, dtype", ((6, 3, "float32"), (4, 1, "bfloat16")))
def test_narrow_heads_have_their_positions_on_lanes(H, G, dtype):
  case = inputs(2, H, G, dtype, D=64)
  assert_close(decode(*case), reference(*case), 2e-6 if dtype == "float32" else 1e-2)


def test_the_last_block_reaches_back(monkeypatch):
  """Blocks of 256 in 384 positions: positions that are in both blocks count once."""
  monkeypatch.setattr(decode_backend, "block_positions", lambda *_: 256)
  case = inputs()
  assert_close(decode(*case), reference(*case), 2e-6)


def test_only_blocks_that_meet_an_interval_are_read():
  """NaN fills the blocks that do not meet the row's interval; 0 * NaN would reach the output."""
  query, key, value, intervals = inputs(mask=short_windows)
  start, stop = map(np.asarray, intervals)
  block = np.arange(384)[None] // 128
  meets = (block >= start // 128) & (block <= (stop - 1) // 128)
  assert 0 < meets.mean() < 0.5
  key, value = (jnp.where(meets[None, :, :, None, None], array, jnp.nan) for array in (key, value))
  actual = decode(query, key, value, intervals)
  clean = (jnp.nan_to_num(array) for array in (key, value))
  assert_close(actual, reference(query, *clean, intervals), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("G, dtype, tolerance", ((1, "float32", 1e-5), (8, "bfloat16", 2e-2)))
def test_int8_heads_that_alternate(G, dtype, tolerance):
  """The two key heads of the suite do not alternate in memory."""
  query, key, value, intervals = inputs(H=8, G=G, dtype=dtype)
  quantized = quantize(key), quantize(value)
  rounded = (dequantize(array, jnp.float32) for array in quantized)
  actual = decode(query, *quantized, intervals)
  assert_close(actual, reference(query, *rounded, intervals), tolerance)


@pytest.mark.slow
def test_two_cores_take_turns_without_races(monkeypatch, capfd):
  """As on v4 and v5p. The second core has no block in the row that has only one."""
  monkeypatch.setattr(parts, "num_cores", lambda: 2)
  case = inputs(mask=lambda B, Q, K: (np.array([[2], [0]]), np.array([[K], [100]])))
  parameters = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True, random_seed=1)
  with pltpu.force_tpu_interpret_mode(parameters):
    actual = jax.block_until_ready(decode(*case))
  assert_close(actual, reference(*case), 2e-6)
  assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
def test_a_cache_over_two_devices_equals_the_whole():
  """One row has no position on the second device."""
  query, key, value, intervals = inputs(K=256)
  stop = jnp.asarray([[256], [100]], jnp.int32)
  arguments = query, key, value, KeyIntervals(jnp.zeros_like(stop), stop)
  mesh = jax.make_mesh((2,), ("ring",), (AxisType.Explicit,), devices=jax.devices()[:2])
  cache = P(None, None, "ring")
  specs = P(), cache, cache, KeyIntervals(P(), P())
  with jax.set_mesh(mesh):
    placed = jax.tree.map(
      lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec)), arguments, specs
    )
    function = functools.partial(decode, axis_names=("ring",))
    actual = jax.jit(jax.shard_map(function, in_specs=specs, out_specs=(P(), P())))(*placed)
  assert_close(actual, reference(*arguments), 2e-6)
