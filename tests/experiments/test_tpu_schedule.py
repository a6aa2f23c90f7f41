"""The schedule report of a kernel that is compiled without a TPU."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
  "flags", (["--kernel=key_grads", "--rows=128"], ["--kernel=decode", "--rows=16", "--dtype=int8"])
)
def test_reports_both_loop_bodies(flags):
  flags = [*flags, "--device=v5e", "--keys=128"]
  report = subprocess.run(
    [sys.executable, "-m", "experiments.tpu_schedule", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  full, masked = (
    re.search(rf"{name} block .*: (\d+) bundles; matrix (\d+)%", report).groups()
    for name in ("full", "masked")
  )
  # A mask takes instructions; the products are the same.
  assert 0 < int(full[0]) < int(masked[0])
  assert int(full[1]) > 0 and int(masked[1]) > 0
