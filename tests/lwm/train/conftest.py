"""Data for a tiny experiment, prepared here: sentences, and a pattern that moves over frames."""

import pathlib
import random
import runpy

import numpy as np
import pytest

from lwm import data
from lwm.experiment import Experiment

CONFIG = pathlib.Path(__file__).with_name("tiny.py")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> pathlib.Path:
  """A directory with tokenizer.model and the datasets text and video."""
  directory = tmp_path_factory.mktemp("data")
  generator = random.Random(0)
  words = ["the", "cat", "dog", "sees", "a", "red", "house", "and", "runs", "1", "2", "3"]
  texts = [
      " ".join(generator.choice(words) for _ in range(generator.randint(5, 120)))
      for _ in range(120)
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


@pytest.fixture
def experiment(prepared) -> Experiment:
  """That of tiny.py."""
  return runpy.run_path(str(CONFIG))["get_config"](str(prepared))
