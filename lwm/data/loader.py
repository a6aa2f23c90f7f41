"""The batches of a stage: a pure function of (datasets, seed, stage, step) on any number of hosts.

B rows of a batch, S sequence_length.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from kernels.ring.layout import Layout
from lwm.config.experiment import Experiment, Stage
from lwm.config.model import ModelConfig
from lwm.data.coverage import check_learnable, coverage
from lwm.data.dataset import TRAIN, VALIDATION, Dataset
from lwm.data.packing import derived_seed
from lwm.data.placement import Placement, Shards
from lwm.data.rows import Rows
from lwm.data.stream import mixed, mixture_weights, read_ahead, shuffled
from lwm.data.tokenizer import load_tokenizer
from lwm.errors import UserError
from lwm.parallel.sharding import ShardingRules

# Every experiment evaluates the same held-out rows.
_EVALUATION_SEED = 0


class Loader:
  """Batches of one stage of an experiment: dicts of the FIELDS of lwm/config/batch.py, [B, S] each.

  The rows of each dataset come in an order that is shuffled again in each epoch. The mixture
  interleaves the datasets in proportion to their weights. Batch b holds the rows [b B, (b + 1) B)
  of this stream; it is the batch of step b unless batches were skipped. Arrays are sharded as
  (batch, sequence), with columns in the order of the stage's layout, and each process reads only
  what its own devices hold.
  """

  def __init__(self, experiment: Experiment, stage: int, mesh: Mesh):
    """
    Args:
      experiment: a validated experiment whose datasets are prepared.
      stage: index of the stage.
      mesh: made by `lwm.parallel.mesh.make_mesh`.

    Raises:
      UserError: a dataset is missing, does not fit the experiment's tokenizer or model or the
        stage's other datasets, or has nothing to learn from in rows of this length.
    """
    self._experiment = experiment
    self.stage = experiment.stages[stage]
    layout = Layout(self.stage.layout, mesh.shape[ShardingRules().ring])
    rows, length = self.stage.rows_per_batch, self.stage.sequence_length
    self._placement = Placement(mesh, layout, rows, length)
    self._evaluation_placement = Placement(
      mesh, layout, rows // self.stage.accumulation_steps, length
    )
    self._configs = {config.name: config for config in experiment.datasets}
    # The datasets of this stage, by name.
    self.datasets = open_datasets(experiment, self.stage)
    streams = []
    self._rows = []
    for index, (name, dataset) in enumerate(self.datasets.items()):
      seed = derived_seed(experiment.seed, stage, name)
      source = Rows(
        dataset.split(TRAIN), dataset.text_vocab_size, length, self._configs[name], seed
      )
      self._rows.append(source)
      streams.append(shuffled(len(source), seed).map(lambda row, index=index: (index, row)))
    self._batches = mixed(streams, self.stage).batch(rows, batch_fn=list).map(self._read)

  def _read(self, picks: Sequence[tuple[int, int]]) -> Shards:
    def read_row(row: int, runs: Sequence[tuple[int, int]], out: dict[str, np.ndarray]) -> None:
      source, row_of_source = picks[row]
      self._rows[source].read(row_of_source, runs, out)

    return self._placement.read(read_row)

  def report(self) -> list[str]:
    """What the stage's rows hold of each dataset, as lines of text."""
    lines = []
    for name, rows in zip(self.datasets, self._rows):
      where, policy = f"{self.stage.name}, {name}", self._configs[name].long_documents
      lines.append(f"{where}: {coverage(rows, np.arange(len(rows)), policy)}")
      if self.datasets[name].has_split(VALIDATION):
        line = f"{where}, held out: {coverage(*self._held_out(name), policy)}"
        lines.append(line if name in self.evaluation_datasets else f"{line}; no held-out loss")
    return lines

  def batch(self, index: int) -> dict[str, jax.Array]:
    """A batch, counted from 0 at the start of the stage."""
    return self._placement.to_arrays(self._batches[index])

  def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, jax.Array]]:
    """The batches [start, stop), read ahead by threads; `stop` is the stage's steps if None."""
    stop = self.stage.steps if stop is None else stop
    for shards in read_ahead(self._batches, self._experiment.data, start, stop):
      yield self._placement.to_arrays(shards)

  @functools.cached_property
  def evaluation_datasets(self) -> list[str]:
    """Names of the stage's datasets whose held-out rows have targets."""
    names = []
    for name, dataset in self.datasets.items():
      if dataset.has_split(VALIDATION):
        rows, picked = self._held_out(name)
        holds_R = rows.hold_targets()
        if holds_R is None or holds_R[picked].any():
          names.append(name)
    return names

  def _held_out(self, dataset: str) -> tuple[Rows, np.ndarray]:
    """The rows of the validation documents, and which of them are evaluated."""
    opened = self.datasets[dataset]
    rows = Rows(
      opened.split(VALIDATION),
      opened.text_vocab_size,
      self.stage.sequence_length,
      dataclasses.replace(self._configs[dataset], weighting="token"),
      _EVALUATION_SEED,
    )
    order = np.random.default_rng(_EVALUATION_SEED).permutation(len(rows))
    return rows, order[: self._experiment.evaluation.rows]

  def evaluation_batches(self, dataset: str) -> Iterator[dict[str, jax.Array]]:
    """Held-out rows of one of the stage's datasets: `evaluation.rows` of them, or all if fewer.

    The rows and their order are fixed, and every target that counts has weight 1, so that losses
    compare with `Dataset.unigram_entropy`. B is the number of rows of one accumulation step; empty
    rows fill up the last batch.

    Raises:
      UserError: the dataset has no validation documents.
    """
    rows, picked = self._held_out(dataset)
    batch_rows = self._evaluation_placement.shape[0]
    for first in range(0, len(picked), batch_rows):
      picks = picked[first : first + batch_rows].tolist()

      def read_row(
        row: int,
        runs: Sequence[tuple[int, int]],
        out: dict[str, np.ndarray],
        picks: list[int] = picks,
      ) -> None:
        if row < len(picks):
          rows.read(picks[row], runs, out)

      yield self._evaluation_placement.to_arrays(self._evaluation_placement.read(read_row))


def open_datasets(experiment: Experiment, stage: Stage) -> dict[str, Dataset]:
  """The datasets of a stage, by name.

  Raises:
    UserError: a dataset is missing, does not fit the experiment's tokenizer or model or the
      stage's other datasets, or has nothing to learn from in rows of this length.
  """
  paths = {config.name: config.path for config in experiment.datasets}
  model = experiment.model
  datasets = {name: Dataset(paths[name], model.text_vocab_size) for name in mixture_weights(stage)}
  tokenizer = load_tokenizer(experiment.tokenizer)
  for dataset in datasets.values():
    dataset.check_tokenizer(tokenizer)
  _check_vision(datasets.values(), model)
  for name, dataset in datasets.items():
    check_learnable(experiment, stage, name, dataset.split(TRAIN))
  return datasets


def _check_vision(datasets: Iterable[Dataset], model: ModelConfig) -> None:
  """Raises UserError unless the datasets' vision ids fit the model, and each other."""
  first = None
  for dataset in datasets:
    layout = dataset.vision_layout
    if layout is None:
      continue
    if layout.vocab_size != model.vision_vocab_size:
      raise UserError(
        f"Dataset {dataset.path} has vision tokens of {layout.vocab_size} ids, but "
        f"config.model.vision_vocab_size is {model.vision_vocab_size}: make them the same."
      )
    first = first or dataset
    if layout != first.vision_layout:
      raise UserError(
        f"Datasets {first.path} and {dataset.path} have different layouts of vision tokens "
        f"({first.vision_layout} and {layout}): a stage needs codes of one VQGAN."
      )
