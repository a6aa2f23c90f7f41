"""A tiny experiment: text at 64 tokens, then text and video at 128; 51 steps in all.

--config=tests/lwm/train/tiny.py:DIRECTORY    # with tokenizer.model, text and video
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


def get_config(directory: str) -> Experiment:
  return Experiment(
    name="tiny",
    tokenizer=f"{directory}/tokenizer.model",
    model=models.debug(text_vocab_size=320),
    optimizer=OptimizerConfig(schedule="cosine", peak_learning_rate=1e-2, end_learning_rate=1e-3),
    datasets=[
      DatasetConfig(name="text", path=f"{directory}/text"),
      DatasetConfig(name="video", path=f"{directory}/video", weighting="example"),
    ],
    stages=[
      Stage(
        name="text_64",
        sequence_length=64,
        tokens_per_batch=512,
        steps=46,
        warmup_steps=2,
        mixture=[MixtureEntry("text")],
      ),
      Stage(
        name="video_128",
        sequence_length=128,
        tokens_per_batch=1024,
        rope_theta=1e5,
        steps=5,
        warmup_steps=1,
        mixture=[MixtureEntry("text"), MixtureEntry("video")],
      ),
    ],
    checkpoint=CheckpointConfig(every_steps=4, keep=2),
    evaluation=EvaluationConfig(every_steps=20, rows=6),
  )
