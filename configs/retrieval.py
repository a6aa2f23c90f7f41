"""A small model that learns to find needles, from scratch, in a context that grows 16 times.

    python -m experiments.retrieval_data --output=data/retrieval
    python -m experiments.train --config=configs/retrieval.py --workdir=runs/retrieval
    python -m experiments.evaluate needle --workdir=runs/retrieval --num_tokens=9 \\
        --haystack=data/retrieval/haystack.txt --contexts=64,128,256,512,1024 --samples=8

Theta rises with the context, as in LWM's recipe. Two variants are for comparison:
`--config=configs/retrieval.py:fixed_theta` keeps the first stage's theta, and
`--config=configs/retrieval.py:long` trains at the last stage's context from the start, for the same
FLOPs. docs/growing_context.md has the results.
"""

from typing import Literal

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

# Context, rope_theta, tokens per batch, steps, peak learning rate. Theta is 0.8 times the context,
# so that the slowest rotation of 64 channels takes about four contexts. Of 64 tokens, most belong
# to a needle and its question: this is quickly learned. Steps of 1024 tokens teach nearly as much
# as steps of 4096.
STAGES = (
  (64, 50.0, 1024, 1000, 2e-3),
  (128, 100.0, 1024, 300, 1e-3),
  (256, 200.0, 1024, 300, 1e-3),
  (512, 400.0, 1024, 300, 1e-3),
  (1024, 800.0, 2048, 800, 1e-3),
)


def _stage(
  context: int, rope_theta: float, tokens_per_batch: int, steps: int, peak_learning_rate: float
) -> Stage:
  return Stage(
    name=f"needles_{context}",
    sequence_length=context,
    rope_theta=rope_theta,
    tokens_per_batch=tokens_per_batch,
    steps=steps,
    warmup_steps=20,
    peak_learning_rate=peak_learning_rate,
    mixture=[MixtureEntry(f"needles_{context}")],
  )


def get_config(variant: Literal["stages", "fixed_theta", "long"] = "stages") -> Experiment:
  """The experiment, or one of those it is compared with."""
  (_, first_theta, _, _, first_peak), (longest, last_theta, batch, _, _) = STAGES[0], STAGES[-1]
  stages = {
    "stages": [_stage(*stage) for stage in STAGES],
    "fixed_theta": [
      _stage(context, first_theta, tokens, steps, peak)
      for context, _, tokens, steps, peak in STAGES
    ],
    "long": [_stage(longest, last_theta, batch, 1219, first_peak)],
  }[variant]
  return Experiment(
    name="retrieval",
    tokenizer="data/retrieval/tokenizer.model",
    model=ModelConfig(
      num_layers=2,
      width=64,
      num_heads=2,
      num_kv_heads=2,
      head_dim=64,
      feed_forward_width=128,
      text_vocab_size=1024,
      vision_vocab_size=0,
      tied_head=True,
      attention_bias=True,
      initializer_std=0.08,
      compute_dtype="float32",
      remat="none",
      loss_chunk=512,
    ),
    optimizer=OptimizerConfig(schedule="cosine", end_learning_rate=1e-4, weight_decay=0.01),
    datasets=[
      DatasetConfig(name=f"needles_{context}", path=f"data/retrieval/needles_{context}")
      for context, *_ in STAGES
    ],
    stages=stages,
    checkpoint=CheckpointConfig(every_steps=1000, keep=8),
    evaluation=EvaluationConfig(every_steps=100, rows=64),
  )
