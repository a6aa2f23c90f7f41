"""Tables of blocks against the mask that they stand for."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention.block_tables import block_tables
from kernels.attention.intervals import KeyIntervals
from tests.kernels.attention_cases import CASES


@pytest.mark.parametrize("name", ("causal", "packed", "sliding_window", "empty_rows"))
def test_block_tables_against_the_mask(name):
  case = next(case for case in CASES if case.name == name)
  start, stop = intervals = case.arrays()[3]
  q, k = 8, 4
  tables = np.asarray(
      block_tables(KeyIntervals(*map(jnp.asarray, intervals)), case.K, q, k)
  )
  mask = (np.arange(case.K) >= start[..., None]) & (np.arange(case.K) < stop[..., None])
  num_full = 0
  for b, i, j in np.ndindex(case.B, -(-case.Q // q), -(-case.K // k)):
    rows = mask[b, i * q : (i + 1) * q, j * k : (j + 1) * k]
    rows = rows[(stop > start)[b, i * q : (i + 1) * q]]
    first, last, full_first, full_last = tables[b, :, i]
    assert first <= full_first <= full_last <= last
    assert not rows.any() or first <= j < last
    if full_first <= j < full_last:
      num_full += 1
      assert rows.shape[1] == k and rows.all() and (i + 1) * q <= case.Q
  assert num_full or name == "sliding_window"
