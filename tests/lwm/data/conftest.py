"""A tiny tokenizer, a tiny text dataset and a tiny video dataset, made once a session."""

import jax
import numpy as np
import pytest

from lwm.config.experiment import (
  DataConfig,
  DatasetConfig,
  EvaluationConfig,
  Experiment,
  MixtureEntry,
  Stage,
)
from lwm.config.model import ModelConfig
from lwm.config.vqgan import LWM_LAYOUT
from lwm.data import (
  DatasetWriter,
  Document,
  load_tokenizer,
  text_document,
  train_sentencepiece,
  video_document,
)
from lwm.parallel.sharding import AXES

_SENTENCE = "the quick brown fox jumps over a lazy dog while 42 owls watch from the old barn"
WORDS = _SENTENCE.split()


def make_text(rng: np.random.Generator, num_words: int) -> str:
  return " ".join(rng.choice(WORDS, num_words))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  train_sentencepiece([" ".join(WORDS)], path, vocab_size=290)
  return load_tokenizer(path)


@pytest.fixture(scope="session")
def documents(tokenizer) -> dict[str, list[Document]]:
  """The training documents of both datasets, some much longer than a row of 64 tokens."""
  rng = np.random.default_rng(0)
  text = [text_document(tokenizer, make_text(rng, n)) for n in rng.integers(2, 90, 40)]
  # An instruction without loss before an answer, as in chat data.
  text = [
    Document(d.tokens, d.loss_mask & (np.arange(len(d.tokens)) >= len(d.tokens) // 3)) for d in text
  ]
  video = [
    video_document(tokenizer, rng.integers(0, 8192, (n, 256)), make_text(rng, 3)) for n in (1, 2, 3)
  ]
  return {"text": text, "video": video}


@pytest.fixture(scope="session")
def datasets(tokenizer, documents, tmp_path_factory) -> dict[str, str]:
  """Paths of two prepared datasets, `text` with validation documents and `video` without."""
  root = tmp_path_factory.mktemp("datasets")
  rng = np.random.default_rng(1)
  for name, train in documents.items():
    with DatasetWriter(root / name, tokenizer, chunk_tokens=50) as writer:
      for document in train:
        writer.write("train", document, name)
      if name == "text":
        for num_words in rng.integers(2, 40, 10):
          writer.write("validation", text_document(tokenizer, make_text(rng, num_words)), name)
  return {name: str(root / name) for name in documents}


@pytest.fixture
def experiment(tokenizer, datasets) -> Experiment:
  """A stage of 10 steps on half text, half video, rows of 64 tokens, 8 rows a batch."""
  return Experiment(
    tokenizer=str(tokenizer.path),
    model=ModelConfig(
      text_vocab_size=tokenizer.vocab_size, vision_vocab_size=LWM_LAYOUT.vocab_size
    ),
    data=DataConfig(threads=2, prefetch_batches=2),
    datasets=[DatasetConfig(name, path) for name, path in datasets.items()],
    stages=[
      Stage(
        sequence_length=64,
        tokens_per_batch=512,
        steps=10,
        mixture=[MixtureEntry("text", 1.0), MixtureEntry("video", 1.0)],
      )
    ],
    evaluation=EvaluationConfig(rows=50),
  )


@pytest.fixture
def make_mesh():
  def make(**sizes: int) -> jax.sharding.Mesh:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(shape, AXES, devices=jax.devices()[: int(np.prod(shape))])

  return make
