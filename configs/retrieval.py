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
# so that the slowest rotation of 32 channels takes three to four contexts. Of 64 tokens, most
# belong to a needle and its question: this is quickly learned.
# At 128 tokens, 400 steps were enough for some runs only (docs/growing_context.md).
STAGES = (
  (64, 50.0, 1024, 600, 3e-3),
  (128, 100.0, 1024, 1200, 2e-3),
  (256, 200.0, 1024, 400, 1e-3),
  (512, 400.0, 1024, 400, 1e-3),
  (1024, 800.0, 2048, 1200, 1e-3),
)
# A quarter of the last stage's rows hold documents of the contexts before. Without them, the model
# forgets how to find needles there.
EARLIER = 0.25


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


def _growing(fixed_theta: float | None = None) -> list[Stage]:
  """The stages, with their own thetas or with one for all."""
  stages = [_stage(*stage) for stage in STAGES]
  for stage in stages:
    stage.rope_theta = fixed_theta or stage.rope_theta
  earlier = [stage.mixture[0].dataset for stage in stages[:-1]]
  stages[-1].mixture[0].weight = 1 - EARLIER
  stages[-1].mixture += [MixtureEntry(name, EARLIER / len(earlier)) for name in earlier]
  return stages


def get_config(variant: Literal["stages", "fixed_theta", "long"] = "stages") -> Experiment:
  """The experiment, or one of those it is compared with."""
  (_, first_theta, _, _, first_peak), (longest, last_theta, batch, _, _) = STAGES[0], STAGES[-1]
  stages = {
    "stages": _growing(),
    "fixed_theta": _growing(first_theta),
    "long": [_stage(longest, last_theta, batch, 1619, first_peak)],
  }[variant]
  return Experiment(
    name="retrieval",
    tokenizer="data/retrieval/tokenizer.model",
    model=ModelConfig(
      num_layers=3,
      width=64,
      num_heads=4,
      num_kv_heads=4,
      head_dim=32,
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
