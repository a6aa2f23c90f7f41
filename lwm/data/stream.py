"""The order in which a stage reads the rows of its datasets, a pure function of the seed."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import grain

from lwm.config.experiment import AnyStage, DataConfig

# More rows than any stage reads of a dataset.
_ROWS_OF_STREAM = 1 << 48


def shuffled(num_rows: int, seed: int) -> grain.MapDataset:
  """The numbers of a dataset's rows, in an order that is shuffled again in each epoch."""
  # Not endless, because grain could not count the rows of a mixture of endless streams.
  epochs = -(-_ROWS_OF_STREAM // num_rows)
  return grain.MapDataset.range(num_rows).shuffle(seed=seed).repeat(epochs)


def mixture_weights(stage: AnyStage) -> dict[str, float]:
  """The weight of each dataset in the stage's mixture, if it is above 0."""
  weights: dict[str, float] = collections.defaultdict(float)
  for entry in stage.mixture:
    if entry.weight > 0:
      weights[entry.dataset] += entry.weight
  return weights


def mixed(streams: Sequence[grain.MapDataset], stage: AnyStage) -> grain.MapDataset:
  """The streams of a stage's datasets, in the order of `mixture_weights`, as one."""
  return grain.MapDataset.mix(streams, list(mixture_weights(stage).values()))


def read_ahead(batches: grain.MapDataset, data: DataConfig, start: int, stop: int) -> Iterator[Any]:
  """The batches [start, stop), read ahead by threads."""
  options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.prefetch_batches)
  return iter(batches.slice(slice(start, stop)).to_iter_dataset(options))
