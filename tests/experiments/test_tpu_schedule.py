"""The schedule report of a kernel that is compiled without a TPU."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def report_of(*flags):
  return subprocess.run(
    [sys.executable, "-m", "experiments.tpu_schedule", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags", (["--kernel=key_grads", "--rows=128"], ["--kernel=decode", "--rows=16", "--dtype=int8"])
)
def test_reports_both_loop_bodies(flags):
  report = report_of(*flags, "--device=v5e", "--keys=128")
  full, masked = (
    re.search(rf"{name} block .*: (\d+) bundles; matrix (\d+)%", report).groups()
    for name in ("full", "masked")
  )
  # A mask takes instructions; the products are the same.
  assert 0 < int(full[0]) < int(masked[0])
  assert int(full[1]) > 0 and int(masked[1]) > 0


@pytest.mark.slow
def test_products_of_experts_fill_the_matrix_units():
  flags = "--kernel=grouped_matmul", "--device=v5e", "--inputs=1024", "--outputs=512"
  (share,) = re.findall(r"block of 512 rows: \d+ bundles; matrix (\d+)%", report_of(*flags))
  assert int(share) > 90
