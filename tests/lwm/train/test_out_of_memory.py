"""A step that takes too much memory ends in a sentence, and leaves a profile."""

import gzip

import jax
import jax.numpy as jnp
import pytest

from lwm.errors import UserError
from lwm.train import loop
from lwm.train.out_of_memory import explain_out_of_memory


@pytest.mark.slow
def test_out_of_memory_is_one_sentence_and_a_profile(experiment, tmp_path, monkeypatch):
  kept = jnp.ones((3, 1 << 20))

  def greedy_step(loop):
    too_much = jax.jit(lambda scale: jnp.ones(1 << 44) * scale)
    return lambda state, batch, limit: (state, {"loss": too_much(2.0)})

  monkeypatch.setattr(loop.StageLoop, "_compile", greedy_step)
  path = tmp_path / "memory_text_64.prof"
  with pytest.raises(UserError, match=r"stage text_64 needs more memory .*Out of memory") as error:
    loop.train(experiment, tmp_path, jax.devices()[:1])
  message = str(error.value)
  assert "\n" not in message
  assert str(path) in message and "experiments.plan" in message and "--stage=text_64" in message
  # What was alive, by the line that made it.
  profile = gzip.decompress(path.read_bytes())
  assert b"test_out_of_memory" in profile
  del kept


@pytest.mark.parametrize(
  "reason",
  ["INTERNAL: something else", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."],
)
def test_other_errors_are_left_alone(reason, experiment, tmp_path):
  with pytest.raises(jax.errors.JaxRuntimeError, match=reason):
    with explain_out_of_memory(tmp_path, "text_64", "try less"):
      raise jax.errors.JaxRuntimeError(reason)
  assert not list(tmp_path.iterdir())
