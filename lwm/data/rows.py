"""Rows of a packing plan, read from a prepared dataset into the fields of a batch.

S sequence_length, C columns asked for, D documents, R rows; a trailing 2 is the modality.
"""

from collections.abc import Sequence

import numpy as np

from lwm.config.experiment import DatasetConfig
from lwm.data.dataset import Split
from lwm.data.long_documents import kept
from lwm.data.packing import pack


class Rows:
  """One epoch of a split as rows of `sequence_length` tokens.

  The weighting `token` gives every target that counts the weight 1. The weighting `example` gives
  all targets of a document and modality one weight, such that every document has the same sum: the
  mean number of targets per document, over the documents that have any, divided by the number of
  targets of this document. Both count only the targets that `long_documents` keeps, and with both
  the weights of a split sum to the number of these targets.
  """

  def __init__(
    self, split: Split, text_vocab_size: int, sequence_length: int, config: DatasetConfig, seed: int
  ):
    """
    Args:
      split: its documents become rows.
      text_vocab_size: number of text ids; vision ids follow them.
      sequence_length: tokens per row.
      config: its weighting and long_documents are used.
      seed: of the order of the documents.

    Raises:
      UserError: the dataset is too old for its setting of `long_documents`.
    """
    self.split = split
    self.kept = kept(split, sequence_length, config.long_documents)
    self.plan = pack(self.kept.length_D, sequence_length, seed)
    self._text_vocab_size = text_vocab_size
    self._weighting = config.weighting
    documents_2 = np.maximum((self.kept.targets_Dx2 > 0).sum(0), 1)
    self._mean_targets_2 = self.kept.targets_Dx2.sum(0) / documents_2

  def __len__(self) -> int:
    return self.plan.num_rows

  def hold_targets(self) -> np.ndarray | None:
    """Whether each row holds a target: bool [R]; None if the dataset is too old to tell."""
    document, first = self.plan.document, self.plan.offset + self.kept.first_D[self.plan.document]
    # A whole document always has a target.
    in_slice = np.ones(len(document), bool)
    part = np.flatnonzero(self.plan.length < self.split.lengths[document])
    if len(part):
      if self.split.target_runs is None:
        return None
      # The target of a token is the next one.
      start = first[part] + 1
      stop = start + self.plan.length[part]
      in_slice[part] = self.split.target_runs.count(document[part], start, stop).any(-1)
    return np.logical_or.reduceat(in_slice, self.plan.row_start[:-1])

  def read(self, row: int, runs: Sequence[tuple[int, int]], out: dict[str, np.ndarray]) -> None:
    """Fills `out` (zeros [C] per field) with the columns of a row that lie in `runs`.

    `runs` are disjoint ranges of global columns, C columns in all. Of each document, only the
    tokens in those columns and the target of the last one are read.
    """
    document, offset, length = self.plan.row(row)
    stop = np.cumsum(length)
    start = stop - length
    filled = 0
    for run_start, run_stop in runs:
      first = np.searchsorted(stop, run_start, side="right")
      last = np.searchsorted(start, run_stop, side="left")
      for piece in range(first, last):
        begin, end = max(start[piece], run_start), min(stop[piece], run_stop)
        at = filled + begin - run_start
        columns = {name: array[at : at + end - begin] for name, array in out.items()}
        columns["positions"][:] = np.arange(begin - start[piece], end - start[piece])
        columns["key_start"][:] = start[piece]
        columns["key_stop"][:] = np.arange(begin + 1, end + 1)
        in_document = self.kept.first_D[document[piece]] + offset[piece]
        self._read_tokens(document[piece], in_document + begin - start[piece], columns)
      filled += run_stop - run_start

  def _read_tokens(self, document: int, begin: int, columns: dict[str, np.ndarray]) -> None:
    """Fills in the document's tokens from `begin`, and the fields that follow from the targets."""
    num_tokens = len(columns["tokens"])
    end = min(begin + num_tokens + 1, self.split.lengths[document])
    tokens, loss_mask = self.split.read(document, begin, end)
    columns["tokens"][:] = tokens[:num_tokens]
    targets, counts = tokens[1:], loss_mask[1:]
    modality = (targets >= self._text_vocab_size).astype(np.int32)
    weights = counts.astype(np.float32)
    if self._weighting == "example":
      targets_2 = np.maximum(self.kept.targets_Dx2[document], 1)
      weights *= (self._mean_targets_2 / targets_2).astype(np.float32)[modality]
    columns["targets"][: len(targets)] = targets
    columns["modality"][: len(targets)] = modality
    columns["loss_weights"][: len(targets)] = weights
