"""A tiny experiment on data that is prepared here: sentences, and a pattern that moves over frames."""

import copy
import pathlib
import random

import numpy as np
import pytest

from configs import models
from lwm import data
from lwm.experiment import CheckpointConfig
from lwm.experiment import DatasetConfig
from lwm.experiment import EvaluationConfig
from lwm.experiment import Experiment
from lwm.experiment import MeshConfig
from lwm.experiment import MixtureEntry
from lwm.experiment import OptimizerConfig
from lwm.experiment import Stage


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
  """Two short stages: text at 64 tokens, then text and video at 128; 12 steps in all."""
  one_device = MeshConfig(fsdp=1)
  return Experiment(
      name="tiny",
      tokenizer=str(prepared / "tokenizer.model"),
      model=models.debug(text_vocab_size=320),
      optimizer=OptimizerConfig(schedule="cosine", peak_learning_rate=1e-2, end_learning_rate=1e-3),
      datasets=[
          DatasetConfig(name="text", path=str(prepared / "text")),
          DatasetConfig(name="video", path=str(prepared / "video"), weighting="example"),
      ],
      stages=[
          Stage(name="text_64", sequence_length=64, tokens_per_batch=512, steps=7, warmup_steps=2,
                mixture=[MixtureEntry("text")], mesh=copy.copy(one_device)),
          Stage(name="video_128", sequence_length=128, tokens_per_batch=1024, rope_theta=1e5,
                steps=5, warmup_steps=1,
                mixture=[MixtureEntry("text"), MixtureEntry("video")], mesh=one_device),
      ],
      checkpoint=CheckpointConfig(every_steps=3, keep=2),
      evaluation=EvaluationConfig(every_steps=4, rows=6),
  )
