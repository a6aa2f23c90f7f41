"""Sizes of the VQGAN and of its training."""

import dataclasses


@dataclasses.dataclass
class VQGANConfig:
  """A convolutional autoencoder with a codebook between its halves. The defaults are LWM's.

  Every level but the last halves the resolution, so a frame of `resolution` pixels becomes a square
  of `grid` by `grid` codes.
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
    """Raises ValueError naming the settings that do not go together."""
    if self.resolution % self.downsampling:
      raise ValueError(
        f"resolution={self.resolution} does not divide by {self.downsampling}, the downsampling "
        f"of channel_multipliers={self.channel_multipliers}."
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
  # First steps, without quantization; the codebook then starts from clusters of the latents.
  continuous_steps: int = 200
  batch_size: int = 8
  peak_learning_rate: float = 2e-3
  warmup_steps: int = 20
  commitment_weight: float = 0.25
  # Of the moving averages that the code vectors are.
  codebook_decay: float = 0.97
  # A code that wins fewer latents a batch than this share of an even split starts anew from one.
  restart_share: float = 0.02

  def validate(self) -> None:
    """Raises ValueError naming the settings that do not go together."""
    if self.batch_size < 1:
      raise ValueError(f"batch_size={self.batch_size} must be at least 1.")
    for name in ("warmup_steps", "continuous_steps"):
      if not 0 <= getattr(self, name) < self.steps:
        raise ValueError(
          f"{name}={getattr(self, name)} is not in [0, steps), steps={self.steps}: change one."
        )
