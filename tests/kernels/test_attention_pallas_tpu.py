"""The TPU kernels in Pallas's TPU interpreter on a CPU: values, gradients, work and races.

The interpreter copies only when a kernel waits for a copy, fills new memory with NaN and visits
"parallel" grid rows in random order. So a missing wait or an assumed order makes a test fail.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from kernels import attention as attention_lib
from kernels.attention import KeyIntervals
from kernels.attention.block_tables import FIRST, FULL_FIRST, FULL_STOP, STOP
from kernels.attention.pallas_tpu import PALLAS_TPU, backend, forward, parts, tiles
from kernels.attention.pallas_tpu.block_sizes import BlockSizes
from kernels.ring import Layout, ring_attention
from tests.kernels import attention_cases
from tests.kernels.attention_cases import Case
from tests.kernels.test_attention import NAMES, TOLERANCES, error, judged, rounded, with_grads

# Lengths of several blocks of 128, the smallest block that a TPU allows; it divides few of them.
CASES = tuple(
  dataclasses.replace(case, **changes)
  for case, changes in (
    (Case("packed", attention_cases.packed), dict(B=2, Q=300, K=300)),
    (Case("sliding_window", attention_cases.sliding_window), dict(B=2, Q=300, K=300)),
    (Case("empty_rows", attention_cases.empty_rows), dict(B=2, Q=300, K=300)),
    (Case("frames", attention_cases.frames, soft_cap=1.5), dict(B=1, Q=260, K=256, G=4)),
    (Case("heads_in_two_tiles", attention_cases.decode), dict(B=1, Q=140, K=400, G=1)),
  )
)
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Tiles of 128 queries of two heads, in parts of one head, and blocks of 128 keys."""
  monkeypatch.setattr(forward, "PART_ROWS", 128)
  monkeypatch.setattr(backend, "block_sizes", lambda *_: BlockSizes(rows=256, keys=128))


@pytest.fixture(autouse=True)
def interpreter():
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(random_seed=0)):
    yield
  pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case):
  arrays, exact = rounded(case.arrays(), "float32")
  actual = with_grads(PALLAS_TPU, case.soft_cap)(*arrays)
  for name, array, wanted in zip(NAMES, actual, judged(exact, case.soft_cap)):
    assert array.dtype == jnp.float32
    assert error(array, wanted) < TOLERANCES["float32"], name


@pytest.mark.slow
def test_bfloat16():
  case = BY_NAME["packed"]
  arrays, exact = rounded(case.arrays(), "bfloat16")
  actual = with_grads(PALLAS_TPU, case.soft_cap)(*arrays)
  assert [array.dtype.name for array in actual] == ["bfloat16", "float32"] + ["bfloat16"] * 3
  for name, array, wanted in zip(NAMES, actual, judged(exact, None)):
    assert error(array, wanted) < TOLERANCES["bfloat16"], name


@pytest.mark.slow
def test_two_cores_share_the_tiles_of_one_row_without_races(monkeypatch, capfd):
  """As on v4 and v5p, whose devices have two cores: one batch row, one key head, three tiles."""
  monkeypatch.setattr(parts, "num_cores", lambda: 2)
  case = dataclasses.replace(BY_NAME["packed"], B=1, H=2, G=1)
  arrays, exact = rounded(case.arrays(), "float32")
  parameters = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True, random_seed=1)
  with pltpu.force_tpu_interpret_mode(parameters):
    actual = jax.block_until_ready(with_grads(PALLAS_TPU)(*arrays))
  for name, array, wanted in zip(NAMES, actual, judged(exact, None)):
    assert error(array, wanted) < TOLERANCES["float32"], name
  assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
def test_blocks_that_meet_no_interval_are_never_computed():
  """All key blocks except one hold NaN, as does the query tile between two that read that block."""
  case = Case("", None, B=1, Q=384, K=512, H=2, G=1)
  query, key, value, _, out_cotangent, log_sum_exp_cotangent = dataclasses.replace(
    case, mask=attention_cases.bidirectional
  ).arrays()
  start, stop = np.full((1, 384), 130, np.int32), np.full((1, 384), 250, np.int32)
  stop[:, 128:256] = 0
  for array in (query, out_cotangent, log_sum_exp_cotangent):
    array[:, 128:256] = np.nan
  for array in (key, value):
    array[:, :128] = array[:, 256:] = np.nan
  arrays, exact = rounded(
    (query, key, value, (start, stop), out_cotangent, log_sum_exp_cotangent), "float32"
  )
  out, log_sum_exp, query_grad, key_grad, value_grad = with_grads(PALLAS_TPU)(*arrays)
  expected = judged(exact, None)
  for array, wanted in zip((out, query_grad, key_grad, value_grad), (*expected[:1], *expected[2:])):
    assert np.isfinite(array).all()
    assert error(array, wanted) < TOLERANCES["float32"]
  assert (np.asarray(log_sum_exp)[:, 128:256] == -np.inf).all()


def random_intervals(B, Q, K):
  random = np.random.default_rng(0)
  start = random.integers(0, K, (B, Q), np.int32)
  return start, np.minimum(start + random.integers(0, 300, (B, Q), np.int32), K).astype(np.int32)


TILING = tiles.Tiling(
  query_length=1000,
  key_length=900,
  num_heads=4,
  num_key_heads=2,
  heads=2,
  queries=128,
  keys=128,
  cores=2,
)


def visits(mask, tiling=TILING):
  """Per query tile and key block: visited by the kernels, visited unmasked, needed, and full."""
  Q, K, N, M = tiling.query_length, tiling.key_length, tiling.num_query_tiles, tiling.num_key_blocks
  bounds = (np.clip(bound, 0, K) for bound in mask(2, Q, K))
  intervals = KeyIntervals(*map(jnp.asarray, bounds))
  interval_tiles = tiles.interval_tiles(intervals, tiling)
  key_spans = tiles.key_spans(interval_tiles, tiling)
  spans = np.asarray(key_spans).reshape(2, N, 1, 4)
  block = np.arange(M)
  visited = (spans[..., FIRST] <= block) & (block < spans[..., STOP])
  full = (spans[..., FULL_FIRST] <= block) & (block < spans[..., FULL_STOP])
  dense = np.zeros((2, N * tiling.queries, M * tiling.keys), bool)
  dense[:, :Q, :K] = attention_lib.mask(intervals, K)
  dense[:, Q : -(-Q // tiling.queries) * tiling.queries] = dense[:, Q - 1 : Q]
  dense = dense.reshape(2, N, tiling.queries, M, tiling.keys)
  query_spans = np.asarray(tiles.query_spans(key_spans, tiling)).reshape(2, 1, M, 2)
  tile = np.arange(N)[:, None]
  # As `QueryWalk`: within the span of the block, and reading it.
  by_keys = visited & (query_spans[..., 0] <= tile) & (tile < query_spans[..., 1])
  np.testing.assert_array_equal(by_keys, visited)
  # The kernel loads the first tile of a span without a look at `key_spans`.
  first, stop = query_spans[..., 0], query_spans[..., 1]
  assert (visited | (tile != first) | (first == stop)).all()
  return visited, full & visited, dense.any((2, 4)), dense.all((2, 4))


@pytest.mark.parametrize(
  "mask",
  (
    attention_cases.causal,
    attention_cases.packed,
    attention_cases.sliding_window,
    attention_cases.frames,
    attention_cases.bidirectional,
    attention_cases.empty_rows,
  ),
  ids=lambda mask: mask.__name__,
)
def test_work_is_the_blocks_that_meet_an_interval(mask):
  """The loops over keys and over queries visit exactly these, and mask only those that need it."""
  visited, unmasked, meets, is_full = visits(mask)
  np.testing.assert_array_equal(visited, meets)
  np.testing.assert_array_equal(unmasked, is_full)
  assert visited.any()


def test_no_block_is_missed_whatever_the_intervals():
  """If a tile's queries see separate ranges of keys, the blocks between them are visited too."""
  visited, unmasked, meets, is_full = visits(random_intervals)
  assert (visited | ~meets).all()
  np.testing.assert_array_equal(unmasked, is_full)


def test_work_of_packed_documents_is_linear_in_the_sequence():
  """With documents of 256 tokens, each tile visits at most two blocks, at any length."""

  def documents(B, Q, K):
    start = np.tile(np.arange(Q, dtype=np.int32) // 256 * 256, (B, 1))
    return start, np.tile(np.arange(1, Q + 1, dtype=np.int32), (B, 1))

  for length in (1024, 4096):
    visited, *_ = visits(documents, TILING._replace(query_length=length, key_length=length))
    assert visited.sum() == 2 * (length // 128) * 1.5


@pytest.mark.slow
def test_inside_a_ring():
  """Local shards in `shard_map`, which checks varying axes, with float32 partial results.

  Every hop has work, because the interpreter would wait forever for a device that skips one.
  """
  case = Case("", attention_cases.bidirectional, B=1, Q=256, K=256, H=2, G=1)
  arrays, exact = rounded(case.arrays(), "float32")
  query, key, value, intervals, *cotangents = arrays
  mesh = jax.make_mesh((2,), ("ring",), (AxisType.Auto,), devices=jax.devices()[:2])
  spec = PartitionSpec(None, "ring")
  attend = jax.shard_map(
    functools.partial(
      ring_attention, layout=Layout("contiguous", 2), axis_name="ring", backend=PALLAS_TPU
    ),
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
  )
  with jax.set_mesh(mesh):
    function = jax.jit(lambda *qkv: attend(*qkv, KeyIntervals(*intervals)))
    results, pull_back = jax.vjp(function, query, key, value)
    actual = *results, *pull_back(tuple(cotangents))
  for name, array, wanted in zip(NAMES, actual, judged(exact, None)):
    assert error(array, wanted) < TOLERANCES["float32"], name
