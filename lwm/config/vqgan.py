"""Sizes of the VQGAN and of its training."""

import dataclasses


@dataclasses.dataclass
class VQGANConfig:
  """A convolutional autoencoder with a codebook in the middle; the defaults are LWM's.

  Every level except the last halves the resolution, so a frame of `resolution` by `resolution`
  pixels becomes `grid` by `grid` codes.
  """

  resolution: int = 256
  hidden_channels: int = 128
  # Channels of each level, from full resolution to the grid, in units of `hidden_channels`.
  channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 6)
  num_res_blocks: int = 2
  latent_channels: int = 64
  codebook_size: int = 8192
  codebook_width: int = 64
  norm_groups: int = 32

  @property
  def level_channels(self) -> tuple[int, ...]:
    return tuple(self.hidden_channels * multiplier for multiplier in self.channel_multipliers)

  @property
  def downsampling(self) -> int:
    """Pixels per code along one side."""
    return 2 ** (len(self.channel_multipliers) - 1)

  @property
  def grid(self) -> int:
    """Codes per frame along one side."""
    return self.resolution // self.downsampling

  def validate(self) -> None:
    """Raises ValueError, naming the settings that are wrong or contradict each other."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      smallest = 0 if field.name == "num_res_blocks" else 1
      sizes = value if isinstance(value, tuple) and value else (value,)
      if not all(isinstance(size, int) and size >= smallest for size in sizes):
        raise ValueError(f"{field.name}={value}: sizes are whole numbers of at least {smallest}.")
    if self.resolution % self.downsampling:
      raise ValueError(
        f"resolution={self.resolution} is not divisible by {self.downsampling}, the downsampling "
        f"of channel_multipliers={self.channel_multipliers}: change one."
      )
    if any(channels % self.norm_groups for channels in self.level_channels):
      raise ValueError(
        f"norm_groups={self.norm_groups} does not divide the channels of every level: "
        f"{self.level_channels}. Change hidden_channels or norm_groups."
      )


@dataclasses.dataclass
class VQGANTrainingConfig:
  """How a VQGAN is trained; see `lwm.vision.train`."""

  steps: int = 800
  # Number of first steps without quantization; the codebook then starts from clusters of latents.
  continuous_steps: int = 200
  batch_size: int = 8
  peak_learning_rate: float = 2e-3
  warmup_steps: int = 20
  commitment_weight: float = 0.25
  # Decay per step of the moving averages that make the code vectors.
  codebook_decay: float = 0.97
  # A code is replaced by a latent when it wins less than this share of an even split of the batch.
  restart_share: float = 0.02

  def validate(self) -> None:
    """Raises ValueError, naming the settings that are wrong or contradict each other."""
    if self.batch_size < 1:
      raise ValueError(f"batch_size={self.batch_size} must be at least 1.")
    if not self.peak_learning_rate > 0:
      raise ValueError(f"peak_learning_rate={self.peak_learning_rate} must be positive.")
    if not self.commitment_weight >= 0:
      raise ValueError(f"commitment_weight={self.commitment_weight} must not be negative.")
    for name in ("codebook_decay", "restart_share"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1).")
    for name in ("warmup_steps", "continuous_steps"):
      if not 0 <= getattr(self, name) < self.steps:
        raise ValueError(
          f"{name}={getattr(self, name)} is not in [0, steps), steps={self.steps}: change one."
        )
