"""A tiny VQGAN's experiment of 8 steps.

--config=tests/lwm/train/tiny_vqgan.py:DIRECTORY    # with frames
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


def get_config(directory: str) -> VQGANExperiment:
  return VQGANExperiment(
    name="tiny_vqgan",
    vqgan=VQGANConfig(
      resolution=16,
      hidden_channels=8,
      channel_multipliers=(1, 1),
      num_res_blocks=0,
      latent_channels=8,
      codebook_size=16,
      codebook_width=8,
      norm_groups=4,
    ),
    losses=VQGANLossConfig(
      continuous_steps=2, adversarial_weight=0.1, discriminator_channels=8, discriminator_layers=1
    ),
    optimizer=OptimizerConfig(peak_learning_rate=2e-3, beta2=0.99, weight_decay=0.0),
    datasets=[FrameDatasetConfig(name="ramps", path=f"{directory}/frames")],
    stages=[
      VQGANStage(
        name="only", frames_per_batch=8, steps=8, warmup_steps=2, mixture=[MixtureEntry("ramps")]
      )
    ],
    checkpoint=CheckpointConfig(every_steps=3, keep=2),
    evaluation=EvaluationConfig(every_steps=5, rows=16),
  )
