"""Data for a tiny experiment, prepared here: sentences, and a pattern that moves over frames."""

import pathlib
import random
import runpy

import numpy as np
import pytest

from lwm import data
from lwm.config.experiment import Experiment
from tests import programs

CONFIG = pathlib.Path(__file__).parent / "train" / "tiny.py"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> pathlib.Path:
  """A directory with tokenizer.model and the datasets text and video."""
  directory = tmp_path_factory.mktemp("data")
  generator = random.Random(0)
  words = ["the", "cat", "dog", "sees", "a", "red", "house", "and", "runs", "1", "2", "3"]
  texts = [
    " ".join(generator.choice(words) for _ in range(generator.randint(5, 120))) for _ in range(120)
  ]
  path = directory / "tokenizer.model"
  data.train_sentencepiece(texts, path, 320)
  tokenizer = data.load_tokenizer(path)
  with data.DatasetWriter(directory / "text", tokenizer) as writer:
    for index, text in enumerate(texts):
      split = "validation" if index % 6 == 0 else "train"
      writer.write(split, data.text_document(tokenizer, text))
  with data.DatasetWriter(directory / "video", tokenizer) as writer:
    for clip in range(8):
      codes_NxP = (np.arange(256)[None, :] // 16 + np.arange(2)[:, None] + clip) % 16
      split = "validation" if clip == 0 else "train"
      writer.write(split, data.video_document(tokenizer, codes_NxP, "a red house"))
  return directory


@pytest.fixture(scope="session")
def make_experiment(prepared):
  """Makes the Experiment of tiny.py."""
  get_config = runpy.run_path(str(CONFIG))["get_config"]
  return lambda: get_config(str(prepared))


@pytest.fixture
def experiment(make_experiment) -> Experiment:
  return make_experiment()


@pytest.fixture(scope="session")
def start_program(prepared):
  """Starts `experiments.NAME` on tiny.py, as a process with one device and a group of its own."""
  environment = programs.one_device() | {"JAX_NUMPY_RANK_PROMOTION": "raise"}

  def start(name: str, *arguments: str) -> programs.Program:
    config = f"--config={CONFIG}:{prepared}"
    return programs.Program(f"experiments.{name}", config, *arguments, environment=environment)

  return start


@pytest.fixture(scope="session")
def undisturbed(start_program, tmp_path_factory) -> pathlib.Path:
  """The workdir of a run of tiny.py from start to end."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  process = start_program("train", f"--workdir={workdir}", "--profile_steps=3:5")
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  (workdir / "output.txt").write_text(output)
  return workdir
