"""Mistakes in the flags of the program that trains."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "README.md"])
def test_a_workdir_that_is_no_directory_is_one_sentence(workdir):
  done = subprocess.run(
      [sys.executable, "-m", "experiments.train", "--config=configs/laptop.py",
       f"--workdir={workdir}"],
      cwd=ROOT, capture_output=True, text=True,
  )
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: --workdir={workdir} is no directory: ")
  assert done.stderr.count("\n") == 1
