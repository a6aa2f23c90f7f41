"""A small model that learns to find needles, from scratch, in a context that grows 16 times.

    python -m experiments.retrieval_data --output=data/retrieval
    python -m experiments.train --config=configs/retrieval.py --workdir=runs/retrieval
    python -m experiments.evaluate needle --workdir=runs/retrieval \\
        --haystack=data/retrieval/haystack.txt --contexts=256,512,1024,2048,4096 --samples=8

Theta rises with the context, as in LWM's recipe. Two variants are for comparison:
`--config=configs/retrieval.py:fixed_theta` keeps the first stage's theta, and
`--config=configs/retrieval.py:long` trains at the last stage's context from the start, on as many
tokens.
"""

from lwm.config.experiment import (
  CheckpointConfig,
  DatasetConfig,
  EvaluationConfig,
  Experiment,
  MixtureEntry,
  OptimizerConfig,
  Stage,
)
from lwm.config.model import ModelConfig

# Context, rope_theta, steps.
STAGES = (
  (256, 1e4, 1500),
  (512, 4e4, 200),
  (1024, 1.6e5, 200),
  (2048, 6.4e5, 150),
  (4096, 2.5e6, 150),
)
_TOKENS_PER_BATCH = 16384


def _stage(context: int, rope_theta: float, steps: int) -> Stage:
  return Stage(
    name=f"needles_{context}",
    sequence_length=context,
    rope_theta=rope_theta,
    tokens_per_batch=_TOKENS_PER_BATCH,
    steps=steps,
    warmup_steps=20,
    mixture=[MixtureEntry(f"needles_{context}")],
  )


def get_config(variant: str = "stages") -> Experiment:
  """The experiment.

  Args:
    variant: `stages`, `fixed_theta` or `long`.
  """
  first_theta, (longest, last_theta, _) = STAGES[0][1], STAGES[-1]
  stages = {
    "stages": [_stage(*stage) for stage in STAGES],
    "fixed_theta": [_stage(context, first_theta, steps) for context, _, steps in STAGES],
    "long": [_stage(longest, last_theta, sum(steps for _, _, steps in STAGES))],
  }[variant]
  return Experiment(
    name="retrieval",
    tokenizer="data/retrieval/tokenizer.model",
    model=ModelConfig(
      num_layers=4,
      width=128,
      num_heads=4,
      num_kv_heads=4,
      head_dim=32,
      feed_forward_width=256,
      text_vocab_size=1024,
      vision_vocab_size=0,
      initializer_std=0.08,
      compute_dtype="float32",
      remat="none",
    ),
    optimizer=OptimizerConfig(
      schedule="cosine", peak_learning_rate=2e-3, end_learning_rate=2e-4, weight_decay=0.1
    ),
    datasets=[
      DatasetConfig(name=f"needles_{context}", path=f"data/retrieval/needles_{context}")
      for context, _, _ in STAGES
    ],
    stages=stages,
    checkpoint=CheckpointConfig(every_steps=500, keep=2),
    evaluation=EvaluationConfig(every_steps=100, rows=8),
  )
