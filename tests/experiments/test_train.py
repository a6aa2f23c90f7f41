"""Mistakes in the flags of experiments.train."""

import os
import subprocess
import sys

import pytest

from tests import programs

TRAIN = "experiments.train", "--config=configs/laptop.py"


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--workdir=gs://bucket/run"], "--workdir=gs://bucket/run is not a directory: "),
    (["--workdir=runs/x", "--profile_steps=761:763"], "--profile_steps=761:763: the run has 760"),
    (["--workdir=runs/x", "--pool=none"], "--pool is for models with experts: set the meshes of"),
  ],
)
def test_a_mistake_is_one_sentence(arguments, message):
  done = programs.run(*TRAIN, *arguments)
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_devices_that_are_not_here_are_one_sentence(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", *TRAIN, f"--workdir={tmp_path}"],
    cwd=programs.ROOT,
    env=os.environ | {"JAX_PLATFORMS": "abacus"},
    capture_output=True,
    text=True,
  )
  last = done.stderr.strip().splitlines()[-1]
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert last.startswith("error: JAX cannot start with JAX_PLATFORMS=abacus (")
