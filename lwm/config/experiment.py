"""All settings of a run as a tree of dataclasses: an Experiment, or a VQGANExperiment.

Functions in configs/ build it, flags override its settings, and `validate` checks it once. Treat it
as immutable after that.
"""

import dataclasses
import pprint

from lwm.config.model import ModelConfig
from lwm.config.vqgan import VQGANConfig, VQGANLossConfig
from lwm.parallel.sharding import MeshConfig

LAYOUTS = ("contiguous", "zigzag")
SCHEDULES = ("constant", "cosine")
WEIGHTINGS = ("token", "example")
LONG_DOCUMENTS = ("cut", "leave_out", "keep_end")
SOFTMAX_RANGES = ("modality", "all")
MOMENT_DTYPES = ("float32", "bfloat16", "int8")
BAD_STEP_POLICIES = ("raise", "skip", "rollback")


@dataclasses.dataclass
class DatasetConfig:
  """A prepared dataset (`experiments.prepare_data`) and how its tokens count in the loss."""

  name: str = ""
  path: str = ""
  # `token`: every target has the same weight. `example`: every document has the same weight.
  weighting: str = "token"
  # How to treat a document that is longer than a row. `cut`: it fills several rows, each of which
  # sees only its own part. `leave_out`: skip it. `keep_end`: use one row of its last tokens.
  long_documents: str = "cut"


@dataclasses.dataclass
class MixtureEntry:
  """The share of a stage's rows that come from a dataset, relative to the sum of all weights."""

  dataset: str = ""
  weight: float = 1.0


@dataclasses.dataclass
class Stage:
  """Training at one context length, starting from the parameters of the stage before it."""

  name: str = ""
  sequence_length: int = 1024
  rope_theta: float = 1e4
  tokens_per_batch: int = 8192
  steps: int = 100
  warmup_steps: int = 10
  mixture: list[MixtureEntry] = dataclasses.field(default_factory=list)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  # How sequences are laid out over the ring (docs/ring.md).
  layout: str = "zigzag"
  accumulation_steps: int = 1
  # None: the setting of OptimizerConfig.
  schedule: str | None = None
  peak_learning_rate: float | None = None
  end_learning_rate: float | None = None
  trainable: list[str] | None = None

  @property
  def rows_per_batch(self) -> int:
    return self.tokens_per_batch // self.sequence_length


@dataclasses.dataclass
class FrameDatasetConfig:
  """A dataset of frames (`experiments.prepare_frames`)."""

  name: str = ""
  path: str = ""


@dataclasses.dataclass
class VQGANStage:
  """Training of a VQGAN on one mixture of frames, starting from the stage before it."""

  name: str = ""
  frames_per_batch: int = 128
  steps: int = 100
  warmup_steps: int = 10
  mixture: list[MixtureEntry] = dataclasses.field(default_factory=list)
  # Frames are divided over `data` and `fsdp`; the other axes have one device.
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  # None: the setting of OptimizerConfig.
  schedule: str | None = None
  peak_learning_rate: float | None = None
  end_learning_rate: float | None = None


@dataclasses.dataclass
class OptimizerConfig:
  """AdamW with global-norm clipping, and a linear warm-up in each stage."""

  schedule: str = "constant"
  peak_learning_rate: float = 4e-5
  end_learning_rate: float = 4e-5
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  # How the moments are kept between updates: float32, bfloat16 or int8 (lwm/program/moments.py), on
  # the device or in host memory.
  moment_dtype: str = "float32"
  offload: bool = False
  # Names of the parameters to train, as globs over their dotted paths: "blocks*.attention.*",
  # "embedding" (lwm/program/trainable.py). The others are frozen. Empty: all, or what `model.lora`
  # and `model.adapter` add.
  trainable: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class LossConfig:
  """How the losses of both modalities are combined.

  Weights are relative to the sum of the weights of the modalities that a batch contains.
  """

  text_weight: float = 0.5
  vision_weight: float = 0.5
  z_loss: float = 0.0
  # `modality`: the softmax of a target runs over the ids of its modality. `all`: over all ids.
  softmax_range: str = "modality"


@dataclasses.dataclass
class CheckpointConfig:
  """A checkpoint every `every_steps` and at the end of a stage; the newest `keep` are kept."""

  every_steps: int = 100
  keep: int = 2


@dataclasses.dataclass
class FaultConfig:
  """What to do about a bad step: its loss or gradient norm is not finite, or its loss is a spike.

  A bad step's update is never applied. `raise` ends the run. `skip` uses the next batch instead.
  `rollback` returns to the last checkpoint and skips all batches from there to the bad one. A stage
  runs all of its steps, however many batches are skipped.
  """

  bad_step: str = "raise"
  # A loss is a spike if it exceeds this factor times the median of the stage's last `spike_window`
  # losses. 0: no loss is a spike.
  spike_factor: float = 0.0
  spike_window: int = 64
  # The run ends after more than this many skipped batches in a row, or rollbacks to one checkpoint.
  max_in_a_row: int = 3


@dataclasses.dataclass
class EvaluationConfig:
  """Evaluation every `every_steps` and at the end of a stage, on held-out rows per dataset.

  A row of a dataset of frames is a frame.
  """

  every_steps: int = 100
  rows: int = 16


@dataclasses.dataclass
class DataConfig:
  """Loading on each host: threads that build batches, and number of batches to build ahead."""

  threads: int = 2
  prefetch_batches: int = 4


@dataclasses.dataclass
class Experiment:
  """All settings of a language model's run. See configs/ for complete experiments."""

  name: str = "experiment"
  seed: int = 0
  # Another run whose parameters this run starts from: its workdir, or one of its checkpoints. It is
  # read only while the workdir has no checkpoint. Empty: random parameters (lwm/train/run.py).
  init_from: str = ""
  # The tokenizer that every dataset must have been prepared with: *.model or tokenizer.json.
  tokenizer: str = ""
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  loss: LossConfig = dataclasses.field(default_factory=LossConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  datasets: list[DatasetConfig] = dataclasses.field(default_factory=list)
  stages: list[Stage] = dataclasses.field(default_factory=list)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
  evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)


@dataclasses.dataclass
class VQGANExperiment:
  """All settings of a VQGAN's run."""

  name: str = "vqgan"
  seed: int = 0
  # As in Experiment.
  init_from: str = ""
  vqgan: VQGANConfig = dataclasses.field(default_factory=VQGANConfig)
  losses: VQGANLossConfig = dataclasses.field(default_factory=VQGANLossConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  datasets: list[FrameDatasetConfig] = dataclasses.field(default_factory=list)
  stages: list[VQGANStage] = dataclasses.field(default_factory=list)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
  evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)


AnyExperiment = Experiment | VQGANExperiment
AnyStage = Stage | VQGANStage


def dump(experiment: AnyExperiment) -> str:
  """The experiment as text, which golden tests compare."""
  return pprint.pformat(experiment, width=100, sort_dicts=False) + "\n"
