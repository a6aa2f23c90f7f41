"""The batches of frames of a stage: a pure function of (datasets, seed, stage, step).

B frames of a batch, H and W height and width in pixels.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from lwm.config.experiment import VQGANExperiment, VQGANStage
from lwm.data.dataset import TRAIN, VALIDATION
from lwm.data.frames import FrameDataset
from lwm.data.packing import derived_seed
from lwm.data.placement import FramePlacement, FrameShards
from lwm.data.stream import mixed, mixture_weights, read_ahead, shuffled
from lwm.errors import UserError

# Every experiment evaluates the same held-out frames.
_EVALUATION_SEED = 0


class FrameLoader:
  """Batches of one stage of a VQGAN's experiment: {"frames": uint8 [B, H, W, 3]}.

  The frames of each dataset come in an order that is shuffled again in each epoch, half of them
  mirrored. The mixture interleaves the datasets in proportion to their weights. Batch b holds the
  frames [b B, (b + 1) B) of this stream; it is the batch of step b unless batches were skipped. B
  is divided over the batch axes of the mesh, and each process reads only what its own devices hold.

  Attributes:
    stage: the stage.
    datasets: of the stage, by name.
  """

  def __init__(self, experiment: VQGANExperiment, stage: int, mesh: Mesh):
    """
    Args:
      experiment: a validated experiment whose datasets are prepared.
      stage: index of the stage.
      mesh: made by `lwm.parallel.mesh.make_mesh`.

    Raises:
      UserError: a dataset is missing or does not fit the VQGAN.
    """
    self._experiment = experiment
    self.stage = experiment.stages[stage]
    self.datasets = open_frames(experiment, self.stage)
    self._opened = list(self.datasets.values())
    self._placement = FramePlacement(mesh, self.stage.frames_per_batch, experiment.vqgan.resolution)
    streams = []
    for index, (name, dataset) in enumerate(self.datasets.items()):
      seed = derived_seed(experiment.seed, stage, name)
      # (dataset, frame, whether to mirror it)
      pick = lambda frame, random, index=index: (index, frame, bool(random.integers(2)))
      streams.append(shuffled(dataset.num_frames(TRAIN), seed).random_map(pick, seed=seed))
    batches = mixed(streams, self.stage).batch(self.stage.frames_per_batch, batch_fn=list)
    self._batches = batches.map(self._read)

  def _read(self, picks: Sequence[tuple[int, int, bool]]) -> FrameShards:
    def read_frame(row: int) -> np.ndarray:
      dataset, frame, mirrored = picks[row]
      frame_HxWx3 = self._opened[dataset].read(TRAIN, frame)
      return frame_HxWx3[:, ::-1] if mirrored else frame_HxWx3

    return self._placement.read(read_frame)

  def report(self) -> list[str]:
    """The number of frames of each dataset, as lines of text."""
    return [
      f"{self.stage.name}, {name}: {dataset.num_frames(TRAIN):,} frames, "
      f"{dataset.num_frames(VALIDATION):,} held out"
      for name, dataset in self.datasets.items()
    ]

  def batch(self, index: int) -> dict[str, jax.Array]:
    """A batch, counted from 0 at the start of the stage."""
    return {"frames": self._placement.to_array(self._batches[index])}

  def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, jax.Array]]:
    """The batches [start, stop), read ahead by threads; `stop` is the stage's steps if None."""
    stop = self.stage.steps if stop is None else stop
    for shards in read_ahead(self._batches, self._experiment.data, start, stop):
      yield {"frames": self._placement.to_array(shards)}

  @property
  def evaluation_datasets(self) -> list[str]:
    """Names of the stage's datasets that have held-out frames."""
    return [name for name, dataset in self.datasets.items() if dataset.has_split(VALIDATION)]

  def held_out(self, dataset: str, index: int) -> np.ndarray:
    """A frame of the fixed, shuffled order of a dataset's held-out frames, which repeats."""
    order = self._held_out_order(dataset)
    return self.datasets[dataset].read(VALIDATION, int(order[index % len(order)]))

  @functools.cache  # noqa: B019  # a loader lives as long as its stage
  def _held_out_order(self, dataset: str) -> np.ndarray:
    count = self.datasets[dataset].num_frames(VALIDATION)
    return np.random.default_rng(_EVALUATION_SEED).permutation(count)

  def evaluation_batches(self, dataset: str) -> Iterator[dict[str, jax.Array]]:
    """Held-out frames of one of the stage's datasets: `evaluation.rows` of them.

    The frames and their order are fixed. They repeat to fill up the last batch.
    """
    batch = self.stage.frames_per_batch
    for first in range(0, self._experiment.evaluation.rows, batch):
      shards = self._placement.read(lambda row: self.held_out(dataset, first + row))
      yield {"frames": self._placement.to_array(shards)}


def open_frames(experiment: VQGANExperiment, stage: VQGANStage) -> dict[str, FrameDataset]:
  """The datasets of a stage, by name.

  Raises:
    UserError: a dataset is missing, or its frames have another resolution than the VQGAN.
  """
  paths = {config.name: config.path for config in experiment.datasets}
  datasets = {name: FrameDataset(paths[name]) for name in mixture_weights(stage)}
  for dataset in datasets.values():
    if dataset.resolution != experiment.vqgan.resolution:
      raise UserError(
        f"Dataset {dataset.path} has frames of resolution {dataset.resolution}, but "
        f"config.vqgan.resolution is {experiment.vqgan.resolution}: make them the same."
      )
  return datasets
