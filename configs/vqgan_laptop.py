"""The laptop experiment's VQGAN: 64x64 pixels, 512 codes, in minutes on two CPU cores.

    python -m experiments.laptop_data --output=data/laptop

trains it on three clips, before it tokenises them. On your own frames (docs/vqgan.md):

    python -m experiments.train --config=configs/vqgan_laptop.py --workdir=runs/vqgan \\
        '--config.datasets[0].path=data/frames'
"""

from configs import models
from lwm.config.experiment import (
  CheckpointConfig,
  EvaluationConfig,
  FrameDatasetConfig,
  MixtureEntry,
  OptimizerConfig,
  VQGANExperiment,
  VQGANStage,
)
from lwm.config.vqgan import VQGANLossConfig


def get_config() -> VQGANExperiment:
  return VQGANExperiment(
    name="vqgan_laptop",
    vqgan=models.laptop_vqgan(),
    losses=VQGANLossConfig(codebook_decay=0.98),
    optimizer=OptimizerConfig(
      schedule="cosine",
      peak_learning_rate=1.5e-3,
      end_learning_rate=0.0,
      beta1=0.9,
      beta2=0.99,
      weight_decay=0.0,
    ),
    datasets=[FrameDatasetConfig(name="clips", path="data/laptop/frames")],
    stages=[
      VQGANStage(
        name="vqgan",
        # At equal time, small batches and more steps reconstruct better.
        frames_per_batch=2,
        steps=2200,
        warmup_steps=20,
        mixture=[MixtureEntry("clips")],
      )
    ],
    checkpoint=CheckpointConfig(every_steps=550, keep=1),
    evaluation=EvaluationConfig(every_steps=550, rows=64),
  )
