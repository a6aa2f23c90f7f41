"""The batches of a stage: a pure function of (datasets, seed, stage, step) on any number of hosts.

B rows of a batch, S sequence_length.
"""

import collections
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from kernels.ring.layout import Layout
from lwm.config.experiment import Experiment
from lwm.config.model import ModelConfig
from lwm.data.dataset import TRAIN, VALIDATION, Dataset
from lwm.data.packing import derived_seed
from lwm.data.placement import Placement, Shards
from lwm.data.rows import Rows
from lwm.data.tokenizer import load_tokenizer
from lwm.errors import UserError
from lwm.parallel.sharding import ShardingRules

# Held-out rows are the same ones in every experiment.
_EVALUATION_SEED = 0

# More than any stage reads of a dataset.
_ROWS_OF_STREAM = 1 << 48


class Loader:
  """Batches of one stage of an experiment: dicts of the FIELDS of lwm/data/rows.py, [B, S] each.

  The rows of each dataset come in an order shuffled anew each epoch; the mixture interleaves the
  datasets in proportion to their weights; batch s takes rows [s B, (s + 1) B) of that stream, and
  is that of step s unless some were passed over. Arrays are sharded by
  `ShardingRules().spec("batch", "sequence")` with columns in the order of the stage's layout, and
  each process reads only what its own devices hold.
  """

  def __init__(self, experiment: Experiment, stage: int, mesh: Mesh):
    """
    Args:
      experiment: a validated experiment whose datasets are prepared.
      stage: index of the stage.
      mesh: of `lwm.parallel.mesh`.

    Raises:
      UserError: a dataset is missing, or does not go with the experiment's tokenizer or model.
    """
    self._experiment = experiment
    self._stage = experiment.stages[stage]
    layout = Layout(self._stage.layout, mesh.shape[ShardingRules().ring])
    rows, length = self._stage.rows_per_batch, self._stage.sequence_length
    self._placement = Placement(mesh, layout, rows, length)
    self._evaluation_placement = Placement(
      mesh, layout, rows // self._stage.accumulation_steps, length
    )
    weights = collections.Counter()
    for entry in self._stage.mixture:
      if entry.weight > 0:
        weights[entry.dataset] += entry.weight
    configs = {config.name: config for config in experiment.datasets}
    # The datasets of this stage, by name.
    self.datasets = {name: Dataset(configs[name].path) for name in weights}
    tokenizer = load_tokenizer(experiment.tokenizer)
    for dataset in self.datasets.values():
      dataset.check_tokenizer(tokenizer)
      _check_model(dataset, experiment.model)

    streams = []
    self._rows = []
    for index, (name, dataset) in enumerate(self.datasets.items()):
      seed = derived_seed(experiment.seed, stage, name)
      source = Rows(
        dataset.split(TRAIN), dataset.text_vocab_size, length, configs[name].weighting, seed
      )
      self._rows.append(source)
      # Not endless: grain could not count the rows of a mixture of such.
      streams.append(
        grain.MapDataset.range(len(source))
        .shuffle(seed=seed)
        .repeat(-(-_ROWS_OF_STREAM // len(source)))
        .map(lambda row, index=index: (index, row))
      )
    mixed = grain.MapDataset.mix(streams, list(weights.values()))
    self._batches = mixed.batch(rows, batch_fn=list).map(self._read)

  def _read(self, picks: Sequence[tuple[int, int]]) -> Shards:
    def read_row(row, runs, out):
      source, row_of_source = picks[row]
      self._rows[source].read(row_of_source, runs, out)

    return self._placement.read(read_row)

  def batch(self, index: int) -> dict[str, jax.Array]:
    """A batch, counted from 0 at the start of the stage."""
    return self._placement.to_arrays(self._batches[index])

  def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, jax.Array]]:
    """The batches [start, stop), read ahead by threads; `stop` is the stage's steps if None."""
    options = grain.ReadOptions(
      num_threads=self._experiment.data.threads,
      prefetch_buffer_size=self._experiment.data.prefetch_batches,
    )
    stop = self._stage.steps if stop is None else stop
    for shards in self._batches.slice(slice(start, stop)).to_iter_dataset(options):
      yield self._placement.to_arrays(shards)

  @property
  def evaluation_datasets(self) -> list[str]:
    """Names of the stage's datasets that have validation documents."""
    return [name for name, dataset in self.datasets.items() if dataset.has_split(VALIDATION)]

  def evaluation_batches(self, dataset: str) -> Iterator[dict[str, jax.Array]]:
    """Held-out rows of one of the stage's datasets: `evaluation.rows` of them, or all if fewer.

    The rows and their order are fixed, and every target that counts has weight 1, so that losses
    compare with `Dataset.unigram_entropy`. B is that of one accumulation step, the last batch is
    filled up with empty rows.

    Raises:
      UserError: the dataset has no validation documents.
    """
    opened = self.datasets[dataset]
    rows = Rows(
      opened.split(VALIDATION),
      opened.text_vocab_size,
      self._stage.sequence_length,
      "token",
      _EVALUATION_SEED,
    )
    order = np.random.default_rng(_EVALUATION_SEED).permutation(len(rows))
    order = order[: self._experiment.evaluation.rows].tolist()
    batch_rows = self._evaluation_placement.shape[0]
    for first in range(0, len(order), batch_rows):
      picks = order[first : first + batch_rows]

      def read_row(row, runs, out, picks=picks):
        if row < len(picks):
          rows.read(picks[row], runs, out)

      yield self._evaluation_placement.to_arrays(self._evaluation_placement.read(read_row))


def _check_model(dataset: Dataset, model: ModelConfig) -> None:
  if dataset.text_vocab_size != model.text_vocab_size:
    raise UserError(
      f"Dataset {dataset.path} has {dataset.text_vocab_size} text ids, but "
      f"config.model.text_vocab_size is {model.text_vocab_size}: set it to the tokenizer's size."
    )
  if dataset.has_vision and dataset.vision_vocab_size != model.vision_vocab_size:
    raise UserError(
      f"Dataset {dataset.path} has vision tokens of {dataset.vision_vocab_size} ids, but "
      f"config.model.vision_vocab_size is {model.vision_vocab_size}: make them the same."
    )
