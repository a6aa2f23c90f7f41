import numpy as np
import pytest

from lwm.data.packing import derived_seed, pack

CASES = {
  "short": (lambda r: r.integers(1, 60, 500), 256),
  "long": (lambda r: r.integers(500, 5000, 20), 64),
  "both": (lambda r: np.concatenate([r.integers(2, 30, 100), [100_000, 64, 128, 1]]), 64),
  "one": (lambda r: np.array([3]), 64),
  "exact": (lambda r: np.full(7, 64), 64),
}


@pytest.mark.parametrize("case", CASES)
def test_every_token_once_and_no_row_too_long(case):
  make, sequence_length = CASES[case]
  lengths = make(np.random.default_rng(0))
  plan = pack(lengths, sequence_length, seed=1)
  seen = [np.zeros(length, int) for length in lengths]
  for row in range(plan.num_rows):
    document, offset, length = plan.row(row)
    assert 0 < length.sum() <= sequence_length and (length > 0).all()
    for d, o, n in zip(document, offset, length):
      assert o + n <= lengths[d]
      seen[d][o : o + n] += 1
  assert all((count == 1).all() for count in seen)


def test_short_documents_stay_whole_and_long_ones_fill_rows():
  lengths = np.array([10, 200, 64, 40])
  plan = pack(lengths, 64, seed=0)
  pieces = [sorted(plan.length[plan.document == d].tolist()) for d in range(4)]
  assert pieces == [[10], [8, 64, 64, 64], [64], [40]]
  # What is left of the second fits with the first and the last.
  assert plan.num_rows == 5


def test_little_padding():
  lengths = np.random.default_rng(0).lognormal(5, 1.2, 5000).astype(int) + 2
  plan = pack(lengths, 2048, seed=0)
  assert lengths.sum() / (plan.num_rows * 2048) > 0.99


def test_the_seed_orders_the_documents_and_nothing_else_does():
  lengths = np.random.default_rng(0).integers(2, 60, 300)
  a, b, other = pack(lengths, 64, 5), pack(lengths, 64, 5), pack(lengths, 64, 6)
  for field in ("row_start", "document", "offset", "length"):
    np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
  assert a.document.tolist() != other.document.tolist()
  assert np.abs(np.diff(a.document)).mean() > 50  # Neighbours in the corpus are not in the row.


def test_derived_seeds_differ_and_stay():
  assert derived_seed(0, 1, "books") == derived_seed(0, 1, "books") == 1478201663
  assert len({derived_seed(s, t, n) for s in range(3) for t in range(3) for n in "ab"}) == 18
