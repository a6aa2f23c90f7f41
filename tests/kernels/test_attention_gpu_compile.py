"""GPU attention compiles ahead of time, without a GPU, and fits the chip.

Compilers run in processes of their own: this one may hold Triton's interpreter.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448}
INSTRUCTIONS = {80: ["mma"], 89: ["mma"], 90: ["wgmma"], 100: ["tcgen05"]}
# Bytes per thread. A few hundred spilled once per block do not stand beside its products.
LARGEST_STACK = 640


def run(*arguments, **variables):
  environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
  finished = subprocess.run(
      [sys.executable, "-m", *map(str, arguments)],
      env=environment | variables,
      capture_output=True,
      text=True,
  )
  assert finished.returncode == 0, finished.stderr[-2000:]
  return finished.stdout


def check(*arguments):
  pytest.importorskip("triton")
  lines = run("tests.kernels.triton_resources", *arguments).splitlines()
  for used in map(json.loads, lines):
    capability = used["capability"]
    assert used["shared"] <= SHARED_MEMORY[capability], used
    assert used["stack"] <= LARGEST_STACK, used
    if used["dtype"] != "float32":
      assert used["instructions"] == INSTRUCTIONS[capability], used
    assert used["blocks"][3] == 1 or used["asynchronous_copies"], used
  return len(lines)


@pytest.mark.parametrize("capability, head_dim", ((80, 64), (90, 128)))
def test_triton_forward_fits(capability, head_dim):
  assert check("--forward", capability, "bfloat16", head_dim) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_triton_kernels_fit(capability, head_dim, dtype):
  assert check(capability, dtype, head_dim) == 3


@pytest.mark.slow
def test_forward_and_backward_compile_for_an_h200():
  if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
    pytest.skip("needs JAX's CUDA plugin: pip install 'jax[cuda13]'")
  assert json.loads(run("tests.kernels.compile_for_gpu", "triton"))["temporary_bytes"] < 2**20
