"""Plans as text."""

import pytest

from lwm.plan.report import milliseconds


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0.0123, "12.3 ms"),
    (0.468, "468 ms"),
    (0.9996, "1.00 s"),
    (3.114, "3.11 s"),
    (173.2, "173.20 s"),
  ],
)
def test_times_are_read_without_exponents(seconds, text):
  assert milliseconds(seconds) == text
