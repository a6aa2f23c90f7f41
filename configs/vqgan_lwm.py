"""A VQGAN of LWM's sizes: 256x256 pixels, 16x16 codes out of 8192, with a patch discriminator.

    python -m experiments.prepare_frames --input=films/ --output=data/frames --resolution=256
    python -m experiments.train --config=configs/vqgan_lwm.py --workdir=runs/vqgan

The discriminator starts after the first tenth of the steps (VQGAN, arXiv 2012.09841, waits until
reconstructions are good). The plan for eight chips:

    python -m experiments.plan --config=configs/vqgan_lwm.py --topology=v5p:2x2x2
    python -m experiments.plan --config=configs/vqgan_lwm.py --topology=h100:1x8
"""

from lwm.config.experiment import (
  CheckpointConfig,
  EvaluationConfig,
  FrameDatasetConfig,
  MixtureEntry,
  OptimizerConfig,
  VQGANExperiment,
  VQGANStage,
)
from lwm.config.vqgan import VQGANConfig, VQGANLossConfig

_STEPS = 200_000


def get_config() -> VQGANExperiment:
  return VQGANExperiment(
    name="vqgan_lwm",
    vqgan=VQGANConfig(),
    losses=VQGANLossConfig(
      continuous_steps=1000, adversarial_weight=0.1, adversarial_start=_STEPS // 10
    ),
    optimizer=OptimizerConfig(
      schedule="cosine",
      peak_learning_rate=1e-4,
      end_learning_rate=1e-5,
      beta1=0.9,
      beta2=0.99,
      weight_decay=0.0,
    ),
    datasets=[FrameDatasetConfig(name="frames", path="data/frames")],
    stages=[
      VQGANStage(
        name="vqgan",
        frames_per_batch=64,
        steps=_STEPS,
        warmup_steps=2000,
        mixture=[MixtureEntry("frames")],
      )
    ],
    checkpoint=CheckpointConfig(every_steps=1000, keep=2),
    evaluation=EvaluationConfig(every_steps=5000, rows=4096),
  )
