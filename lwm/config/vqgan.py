"""Sizes of the VQGAN and of its training, and the layout of the vision tokens that it makes."""

import dataclasses
import math

# Codes of LWM's VQGAN. Smaller codebooks keep the same end marks.
_LWM_CODEBOOK_SIZE = 8192
# LWM rounds the number of vision ids up to a multiple of this.
_VOCAB_MULTIPLE = 256
# The ranges of pixels that VQGANs are trained with.
PIXEL_RANGES = ((-1, 1), (0, 1))
QUANTIZERS = ("moving_average", "simvq", "ibq", "fsq")
# 8192 codes.
FSQ_LEVELS = (8, 8, 8, 4, 4)


@dataclasses.dataclass(frozen=True)
class VisionLayout:
  """How frames are laid out in vision ids: codes in [0, end_of_frame), then the two end marks.

  Vision ids count from 0; in the model's id space they follow the text ids. See
  lwm/data/vision_tokens.py.
  """

  # The grid of a frame, row by row.
  codes_per_frame: int
  # The id <eof>, after every frame but the last of a clip.
  end_of_frame: int

  @property
  def end_of_vision(self) -> int:
    """The id <eov>, after the last frame of a clip."""
    return self.end_of_frame + 1

  @property
  def tokens_per_frame(self) -> int:
    return self.codes_per_frame + 1

  @property
  def vocab_size(self) -> int:
    """Vision ids, rounded up; ids above `end_of_vision` are never used."""
    return -(-(self.end_of_vision + 1) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


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
  codebook_size: int = _LWM_CODEBOOK_SIZE
  codebook_width: int = 64
  norm_groups: int = 32
  # The values of black and of white, in and out. LWM's VQGAN uses -1 and 1; aMUSEd's, which is the
  # same network, uses 0 and 1.
  pixel_range: tuple[int, int] = (-1, 1)

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

  @property
  def layout(self) -> VisionLayout:
    """The layout of this VQGAN's frames; every codebook of up to 8192 codes has LWM's end marks."""
    return VisionLayout(self.grid**2, max(self.codebook_size, _LWM_CODEBOOK_SIZE))

  def validate(self) -> None:
    """Raises ValueError, naming the settings that are wrong or contradict each other."""
    if self.pixel_range not in PIXEL_RANGES:
      known = " or ".join(map(str, PIXEL_RANGES))
      raise ValueError(f"pixel_range={self.pixel_range} must be {known}.")
    for field in dataclasses.fields(self):
      if field.name == "pixel_range":
        continue
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


# 256 codes per frame, <eof> 8192, <eov> 8193, 8448 ids.
LWM_LAYOUT = VQGANConfig().layout


@dataclasses.dataclass
class VQGANLossConfig:
  """The quantizer and the losses of VQGAN training; see `lwm.vision.objective`."""

  # One of QUANTIZERS; see `lwm.vision.quantizers`.
  quantizer: str = "moving_average"
  # moving_average: number of first steps in which the decoder sees latents that are not quantized.
  # Each of these steps draws all codes from its latents.
  continuous_steps: int = 200
  commitment_weight: float = 0.25
  # moving_average: decay per step of the averages that make the code vectors.
  codebook_decay: float = 0.97
  # moving_average: a code is replaced by a latent when it wins less than this share of an even
  # split of the batch. 0: no code is replaced.
  restart_share: float = 0.02
  # ibq: the soft assignment is a softmax of the negative squared distances over this.
  temperature: float = 1.0
  # ibq: the weight of the entropy loss, the same in all steps.
  entropy_weight: float = 0.1
  # fsq: values per latent channel; they multiply to the codebook's size.
  levels: tuple[int, ...] = FSQ_LEVELS
  # Weight of the distance between features of a frame and its reconstruction. They come from the
  # network in `perceptual_file` (`lwm.vision.perceptual` states its layout), or from the
  # discriminator if no file is named.
  perceptual_weight: float = 0.0
  perceptual_file: str = ""
  # 0: no discriminator.
  adversarial_weight: float = 0.0
  # The first step of the discriminator and of its loss.
  adversarial_start: int = 0
  discriminator_channels: int = 64
  # Convolutions with stride 2.
  discriminator_layers: int = 3
  # Decay per step of the average of the parameters, which is what is evaluated and saved. 0: none.
  average_decay: float = 0.999

  def validate(self, config: VQGANConfig) -> None:
    """Raises ValueError, naming the settings that are wrong or contradict each other."""
    if self.quantizer not in QUANTIZERS:
      raise ValueError(f"quantizer={self.quantizer!r} must be one of {', '.join(QUANTIZERS)}.")
    for name in ("codebook_decay", "restart_share", "average_decay"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1).")
    weights = "commitment_weight", "entropy_weight", "perceptual_weight", "adversarial_weight"
    for name in (*weights, "continuous_steps", "adversarial_start"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
    if not self.temperature > 0:
      raise ValueError(f"temperature={self.temperature} must be positive.")
    for name in ("discriminator_channels", "discriminator_layers"):
      if not getattr(self, name) >= 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
    if self.quantizer == "fsq":
      if any(level < 2 for level in self.levels) or math.prod(self.levels) != config.codebook_size:
        raise ValueError(
          f"levels={self.levels} must be at least 2 each and multiply to "
          f"codebook_size={config.codebook_size}: change one."
        )
      if len(self.levels) != config.codebook_width:
        raise ValueError(
          f"levels={self.levels} has {len(self.levels)} values, which must be "
          f"codebook_width={config.codebook_width}: change one."
        )
    if self.perceptual_weight and not (self.perceptual_file or self.adversarial_weight):
      raise ValueError(
        f"perceptual_weight={self.perceptual_weight} needs features: name a perceptual_file, or "
        "set adversarial_weight to use those of the discriminator."
      )
    if self.perceptual_file and not self.perceptual_weight:
      raise ValueError(
        f"perceptual_file={self.perceptual_file!r} is not used while perceptual_weight=0: change "
        "one."
      )
