"""Checks block tables against the mask that they represent."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import block_tables
from kernels.attention.intervals import KeyIntervals
from tests.kernels.attention_cases import CASES


@pytest.mark.parametrize("name", ("causal", "packed", "sliding_window", "empty_rows"))
def test_tables_against_the_mask(name, monkeypatch):
  monkeypatch.setattr(block_tables, "KEY_BLOCKS_AT_ONCE", 3)
  case = next(case for case in CASES if case.name == name)
  start, stop = intervals = case.arrays()[3]
  q, k = 8, 4
  N, M = -(-case.Q // q), -(-case.K // k)
  pairs = KeyIntervals(*map(jnp.asarray, intervals))
  of_queries = block_tables.of_queries(pairs, case.K, q, k)
  of_keys = np.asarray(block_tables.of_keys(of_queries, M))
  of_queries = np.asarray(of_queries)
  assert of_queries.shape == (case.B, 4, N) and of_keys.shape == (case.B, 4, M)
  mask = (np.arange(case.K) >= start[..., None]) & (np.arange(case.K) < stop[..., None])
  num_full = [0, 0]
  for b, i, j in np.ndindex(case.B, N, M):
    rows = mask[b, i * q : (i + 1) * q, j * k : (j + 1) * k]
    rows = rows[(stop > start)[b, i * q : (i + 1) * q]]
    for side, (ranges, index) in enumerate(((of_queries[b, :, i], j), (of_keys[b, :, j], i))):
      first, last, full_first, full_last = ranges
      assert first <= full_first <= full_last <= last
      assert not rows.any() or first <= index < last
      if full_first <= index < full_last:
        num_full[side] += 1
        assert rows.shape[1] == k and rows.all() and (i + 1) * q <= case.Q
  assert all(num_full) or name == "sliding_window"


def test_ranges_are_exact_for_packed_documents():
  """Each of four documents has two blocks, of which three pairs meet."""
  index = jnp.arange(64, dtype=jnp.int32)[None]
  pairs = KeyIntervals(index // 16 * 16, index + 1)
  of_queries = block_tables.of_queries(pairs, 64, 8, 8)
  for tables in (of_queries, block_tables.of_keys(of_queries, 8)):
    first, last, full_first, full_last = np.asarray(tables[0])
    assert (last - first).sum() == 4 * 3
    assert (full_last - full_first).sum() == 4


def test_full_blocks_that_are_not_contiguous_are_masked():
  """Queries 0..7 and 16..23 see all keys; the queries between them see half."""
  stop = jnp.repeat(jnp.asarray([[8, 4, 8]], jnp.int32), 8, axis=1)
  of_queries = block_tables.of_queries(KeyIntervals(jnp.zeros_like(stop), stop), 8, 8, 8)
  np.testing.assert_array_equal(block_tables.of_keys(of_queries, 1)[0, :, 0], [0, 3, 3, 3])
