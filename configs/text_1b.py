"""A model of 1.2 billion parameters at 32K tokens, on one GPU of 80 GB.

    make train
    python -m experiments.benchmark train --config=configs/text_1b.py
    python -m experiments.train --config=configs/text_1b.py --workdir=runs/text_1b

The data are those of `make train`: documents of 7K tokens on average, packed into rows. Your own
take their place with `--config.tokenizer` and `'--config.datasets[0].path=...'`.
"""

import dataclasses

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


def get_config() -> Experiment:
  return Experiment(
    name="text_1b",
    tokenizer="data/laptop/tokenizer.model",
    model=dataclasses.replace(models.lwm_1b(), remat="attention"),
    optimizer=OptimizerConfig(
      schedule="cosine", peak_learning_rate=3e-4, end_learning_rate=3e-5, weight_decay=0.1
    ),
    datasets=[DatasetConfig(name="text", path="data/laptop/text")],
    stages=[
      Stage(
        name="text_32k",
        sequence_length=32768,
        rope_theta=1e6,
        tokens_per_batch=32768,
        steps=1000,
        warmup_steps=100,
        mixture=[MixtureEntry("text")],
      )
    ],
    checkpoint=CheckpointConfig(every_steps=500, keep=1),
    evaluation=EvaluationConfig(every_steps=500, rows=4),
  )
