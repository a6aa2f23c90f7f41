"""A dense model and the one with experts that it becomes compute the same."""

import pathlib

import numpy as np
import pytest

from lwm.checkpoint.reader import newest
from lwm.config.model import ROUTERS, ExpertsConfig
from lwm.convert import import_weights, read_hugging_face, upcycle
from tests import programs
from tests.lwm.convert.test_hugging_face import GOLDEN, our_logits
from tests.lwm.convert.test_hugging_face_export import write_words


def run(*arguments: str):
  return programs.run("experiments.upcycle", *arguments)


def logits(checkpoint: pathlib.Path) -> np.ndarray:
  return our_logits(checkpoint, np.load(GOLDEN / "qwen3" / "logits.npz")["ids"])


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("dense")
  import_weights(read_hugging_face(GOLDEN / "qwen3", write_words(folder / "words")), folder / "own")
  return folder / "own"


@pytest.mark.slow
def test_the_logits_are_equal_and_noise_changes_them(tmp_path: pathlib.Path, dense: pathlib.Path):
  for name, flags in (("equal", ("--router=sigmoid",)), ("noisy", ("--noise=0.1",))):
    result = run(f"--input={dense}", f"--output={tmp_path / name}", "--num_experts=5", *flags)
    assert result.returncode == 0, result.stderr
  expected, equal, noisy = map(logits, (dense, tmp_path / "equal", tmp_path / "noisy"))
  np.testing.assert_allclose(equal, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  assert np.abs(noisy - expected).max() > 1e-2
  experts = newest(tmp_path / "equal").experiment.model.experts
  assert (experts.num_experts, experts.experts_per_token, experts.width) == (5, 2, 32)

  again = run(f"--input={tmp_path / 'equal'}", f"--output={tmp_path / 'again'}")
  assert again.returncode == 1 and "name a dense model" in again.stderr
  assert not (tmp_path / "again").exists()
  assert newest(tmp_path / "equal").stage.name == "imported"


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
  "slices, shared_experts, num_experts, experts_per_token",
  # All slices but one are shared; none is; each is chosen twice by a token.
  [(4, 3, 7, 1), (2, 0, 8, 2), (4, 2, 6, 4)],
)
def test_experts_that_are_slices_of_the_network_compute_the_same(
  tmp_path: pathlib.Path,
  dense: pathlib.Path,
  router: str,
  slices: int,
  shared_experts: int,
  num_experts: int,
  experts_per_token: int,
):
  experts = ExpertsConfig(
    num_experts, experts_per_token, shared_experts=shared_experts, router=router
  )
  upcycle(newest(dense), tmp_path / "sliced", experts, slices=slices)
  expected = logits(dense)
  np.testing.assert_allclose(
    logits(tmp_path / "sliced"), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )
  stored = newest(tmp_path / "sliced").experiment.model.experts
  assert stored.width == 32 // slices


@pytest.mark.parametrize(
  "flags, message",
  [
    (("--slices=5",), "cannot be cut into 5 equal slices"),
    (("--slices=4", "--shared_experts=4"), "leave none of 4 slices"),
    (("--slices=4", "--shared_experts=1"), "must be multiples of 3"),
  ],
)
def test_slices_that_do_not_fit_are_an_error(
  tmp_path: pathlib.Path, dense: pathlib.Path, flags: tuple[str, ...], message: str
):
  result = run(f"--input={dense}", f"--output={tmp_path / 'sliced'}", *flags)
  assert result.returncode == 1 and message in result.stderr
  assert not (tmp_path / "sliced").exists()
