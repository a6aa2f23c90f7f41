"""The suite of `test_grouped_matmul` on the TPU kernels, in Pallas's TPU interpreter on a CPU.

`test_attention_pallas_tpu` says what the interpreter finds.
"""

import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.experts.pallas_tpu import PALLAS_TPU, kernel
from tests.kernels import test_grouped_matmul as suite
from tests.kernels.test_grouped_matmul import no_silent_broadcast


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
  """Two blocks of inputs, three of outputs, and several of rows."""
  monkeypatch.setattr(suite, "K", 16)
  monkeypatch.setattr(suite, "N", 24)
  monkeypatch.setattr(kernel, "LANES", 8)
  monkeypatch.setattr(kernel, "BLOCK_ROWS", 16)
  monkeypatch.setattr(kernel, "ROW_BYTES", 32)


@pytest.fixture(autouse=True)
def interpreter():
  suite.arrays.cache_clear()
  suite.judged.cache_clear()
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(random_seed=0)):
    yield
  pltpu.reset_tpu_interpret_mode_state()


# A group over several blocks, many groups in one block, and no group at all.
@pytest.mark.parametrize(
  "case, dtype", (("skewed", "float32"), ("many", "bfloat16"), ("none", "float32"))
)
def test_values_and_gradients(case, dtype):
  suite.test_values_and_gradients(case, dtype, PALLAS_TPU)
