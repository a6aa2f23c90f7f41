"""The suite of `test_quantised_matmul` on the TPU kernel, in Pallas's TPU interpreter on a CPU.

`test_attention_pallas_tpu` says what the interpreter finds.
"""

import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.quantised_matmul.pallas_tpu import PALLAS_TPU, kernel
from tests.kernels.test_quantised_matmul import (
  no_silent_broadcast,
  test_equals_reference,
  test_leading_axes_of_x_are_kept,
)


@pytest.fixture
def backend():
  return PALLAS_TPU


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
  """Three blocks of 128 outputs, the last of which is not full, in steps of one or more groups."""
  monkeypatch.setattr(kernel, "BLOCK_BYTES", 1)
  monkeypatch.setattr(kernel, "STEP_ROWS", 64)


@pytest.fixture(autouse=True)
def interpreter():
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(random_seed=0)):
    yield
  pltpu.reset_tpu_interpret_mode_state()
