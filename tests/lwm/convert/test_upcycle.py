"""A dense model and the one with experts that it becomes compute the same."""

import pathlib

import numpy as np
import pytest

from lwm.checkpoint.reader import newest
from lwm.convert import import_weights, read_hugging_face
from tests import programs
from tests.lwm.convert.test_hugging_face import GOLDEN, our_logits
from tests.lwm.convert.test_hugging_face_export import write_words


def run(*arguments: str):
  return programs.run("experiments.upcycle", *arguments)


@pytest.mark.slow
def test_the_logits_are_equal_and_noise_changes_them(tmp_path: pathlib.Path):
  dense = tmp_path / "dense"
  words = write_words(tmp_path / "words")
  import_weights(read_hugging_face(GOLDEN / "qwen3", words), dense)
  for name, flags in (("equal", ("--router=sigmoid",)), ("noisy", ("--noise=0.1",))):
    result = run(f"--input={dense}", f"--output={tmp_path / name}", "--num_experts=5", *flags)
    assert result.returncode == 0, result.stderr
  ids = np.load(GOLDEN / "qwen3" / "logits.npz")["ids"]
  expected, equal, noisy = (
    our_logits(tmp_path / name, ids) for name in ("dense", "equal", "noisy")
  )
  np.testing.assert_allclose(equal, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  assert np.abs(noisy - expected).max() > 1e-2
  experts = newest(tmp_path / "equal").experiment.model.experts
  assert (experts.num_experts, experts.experts_per_token, experts.width) == (5, 2, 32)

  again = run(f"--input={tmp_path / 'equal'}", f"--output={tmp_path / 'again'}")
  assert again.returncode == 1 and "name a dense model" in again.stderr
  assert not (tmp_path / "again").exists()
  assert newest(tmp_path / "equal").stage.name == "imported"
