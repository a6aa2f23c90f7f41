"""Rows of a packing plan, read from a prepared dataset into the fields of a batch.

S sequence_length, C columns asked for, D documents.
"""

from collections.abc import Sequence

import numpy as np

from lwm.data.dataset import Split
from lwm.data.packing import pack


class Rows:
  """One epoch of a split as rows of `sequence_length` tokens.

  weighting `token` gives every target that counts the weight 1. `example` gives the targets of a
  document equal weights, with the same sum for every document: for each modality apart, the mean
  number of targets of the documents that have any, over the number in this document. The weights of
  a split sum to its number of targets either way.
  """

  def __init__(
    self, split: Split, text_vocab_size: int, sequence_length: int, weighting: str, seed: int
  ):
    self._split = split
    self._text_vocab_size = text_vocab_size
    self._weighting = weighting
    self.plan = pack(split.lengths, sequence_length, seed)
    documents_2 = np.maximum((split.targets > 0).sum(0), 1)
    self._mean_targets_2 = split.targets.sum(0) / documents_2

  def __len__(self) -> int:
    return self.plan.num_rows

  def read(self, row: int, runs: Sequence[tuple[int, int]], out: dict[str, np.ndarray]) -> None:
    """Fills `out` (zeros [C] per field) with the columns of a row that lie in `runs`.

    `runs` are disjoint ranges of global columns, of C columns together. Of each document only the
    tokens in those columns, and the target after the last, are read.
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
        self._read_tokens(document[piece], offset[piece] + begin - start[piece], columns)
      filled += run_stop - run_start

  def _read_tokens(self, document: int, begin: int, columns: dict[str, np.ndarray]) -> None:
    """Fills tokens from `begin` of the document, and what follows from their targets."""
    num_tokens = len(columns["tokens"])
    end = min(begin + num_tokens + 1, self._split.lengths[document])
    tokens, loss_mask = self._split.read(document, begin, end)
    columns["tokens"][:] = tokens[:num_tokens]
    targets, counts = tokens[1:], loss_mask[1:]
    modality = (targets >= self._text_vocab_size).astype(np.int32)
    weights = counts.astype(np.float32)
    if self._weighting == "example":
      targets_2 = np.maximum(self._split.targets[document], 1)
      weights *= (self._mean_targets_2 / targets_2).astype(np.float32)[modality]
    columns["targets"][: len(targets)] = targets
    columns["modality"][: len(targets)] = modality
    columns["loss_weights"][: len(targets)] = weights
