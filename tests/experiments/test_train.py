"""Mistakes in the flags of the program that trains."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.parametrize("arguments, message", [
    (["--workdir=gs://bucket/run"], "--workdir=gs://bucket/run is no directory: "),
    (["--workdir=README.md"], "--workdir=README.md is no directory: "),
    (["--workdir=runs/x", "--profile_steps=761:763"], "--profile_steps=761:763: the run has 760"),
])
def test_a_mistake_is_one_sentence(arguments, message):
  done = subprocess.run(
      [sys.executable, "-m", "experiments.train", "--config=configs/laptop.py", *arguments],
      cwd=ROOT, capture_output=True, text=True,
  )
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
