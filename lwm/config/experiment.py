"""The Experiment: a tree of mutable dataclasses that configs/ builds, flags override, and
`validate` checks once. Treat it as immutable after that.
"""

import dataclasses
import pprint

from lwm.config.model import ModelConfig
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
  # `token`: every target counts alike. `example`: every document counts alike.
  weighting: str = "token"
  # What becomes of a document longer than a row. `cut`: it fills several rows, each of which sees
  # only its own part. `leave_out`: it is not trained on. `keep_end`: its last tokens fill one row.
  long_documents: str = "cut"


@dataclasses.dataclass
class MixtureEntry:
  """A dataset's share of a stage's rows; shares are relative to their sum."""

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
  # How the sequence is laid out over the ring.
  layout: str = "zigzag"
  accumulation_steps: int = 1
  # None: the optimizer's own setting.
  schedule: str | None = None
  peak_learning_rate: float | None = None
  end_learning_rate: float | None = None

  @property
  def rows_per_batch(self) -> int:
    return self.tokens_per_batch // self.sequence_length


@dataclasses.dataclass
class OptimizerConfig:
  """AdamW, with global-norm clipping and a linear warm-up in each stage."""

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


@dataclasses.dataclass
class LossConfig:
  """How the losses of both modalities become one; shares are relative to those in a batch."""

  text_weight: float = 0.5
  vision_weight: float = 0.5
  z_loss: float = 0.0
  # `modality`: a target's softmax runs over its own modality's ids; `all`: over both.
  softmax_range: str = "modality"


@dataclasses.dataclass
class CheckpointConfig:
  every_steps: int = 100
  keep: int = 2


@dataclasses.dataclass
class FaultConfig:
  """What to do about a bad step: its loss or gradient norm is not finite, or its loss is a spike.

  Its update is never applied. `raise` ends the run. `skip` passes over its batch and takes the next
  in its place. `rollback` goes back to the last checkpoint, and passes over all batches from there
  to the bad one. A stage makes all of its steps whatever is passed over.
  """

  bad_step: str = "raise"
  # A spike is a loss above this times the median of the stage's last `spike_window`; 0: none is.
  spike_factor: float = 0.0
  spike_window: int = 64
  # Batches skipped in a row, or times rolled back to one checkpoint, before the run ends.
  max_in_a_row: int = 3


@dataclasses.dataclass
class EvaluationConfig:
  """Held-out loss every `every_steps` and at the end of a stage, on `rows` rows of each dataset."""

  every_steps: int = 100
  rows: int = 16


@dataclasses.dataclass
class DataConfig:
  """Host-side loading: threads that build batches, and batches built ahead."""

  threads: int = 2
  prefetch_batches: int = 4


@dataclasses.dataclass
class Experiment:
  """Everything that a run is. See configs/ for complete ones."""

  name: str = "experiment"
  seed: int = 0
  # A run whose parameters this run starts from: its workdir, or one of its checkpoints. Read only
  # where the workdir has no checkpoint yet; empty means random parameters (lwm/train/run.py).
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


def dump(experiment: Experiment) -> str:
  """The experiment as text, one setting a line where they do not fit: what golden tests compare."""
  return pprint.pformat(experiment, width=100, sort_dicts=False) + "\n"
