"""Where the targets of a split are, without reading its tokens.

L tokens of a document, D documents, R runs, P slices of documents; a trailing 2 is the modality.
"""

import numpy as np

from lwm.config.batch import MODALITIES


def target_runs(loss_mask_L: np.ndarray, modality_L: np.ndarray) -> np.ndarray:
  """The runs of a document's targets: int64 [R, 3], as in `TargetRuns`, counted from its start.

  Args:
    loss_mask_L: which tokens count in the loss when they are the target. The first token never is.
    modality_L: the index of each token in MODALITIES.
  """
  label_L = np.where(loss_mask_L, modality_L, -1)
  label_L[:1] = -1
  edges = np.flatnonzero(np.diff(label_L, prepend=-1, append=-1))
  runs_Rx3 = np.stack([edges[:-1], edges[1:], label_L[edges[:-1]]], axis=-1)
  return runs_Rx3[runs_Rx3[:, 2] >= 0]


class TargetRuns:
  """Counts the targets in any slice of a document of a split.

  A run is a stretch of targets of one modality: (first token, token after the last, modality).
  Tokens are numbered through all documents of the split. Memory is O(R), and a document has about
  as many runs as it has pieces: one for a book, one per answer of a conversation.
  """

  def __init__(self, lengths_D: np.ndarray, runs_Rx3: np.ndarray):
    """
    Args:
      lengths_D: tokens of each document.
      runs_Rx3: int64, in increasing order, disjoint.
    """
    self._first_token_D = np.cumsum(lengths_D) - lengths_D
    self._runs_of_modality = []
    for modality in range(len(MODALITIES)):
      start_R, stop_R = runs_Rx3[runs_Rx3[:, 2] == modality, :2].T
      targets = np.concatenate([[0], np.cumsum(stop_R - start_R)])
      self._runs_of_modality.append((start_R, np.concatenate([[0], stop_R]), targets))

  def count(self, document_P: np.ndarray, start_P: np.ndarray, stop_P: np.ndarray) -> np.ndarray:
    """Targets among the tokens [start, stop) of each document: int64 [P, 2].

    `stop` may be one more than the length of the document.
    """
    # One more is the first token of the next document, which is never a target.
    first_P = self._first_token_D[document_P]
    return self._before(first_P + stop_P) - self._before(first_P + start_P)

  def _before(self, token_P: np.ndarray) -> np.ndarray:
    """Targets of the split before each token: int64 [P, 2]."""
    counts = []
    for start_R, stop, targets in self._runs_of_modality:
      # All targets of the runs that start before the token, except those after it in the last run.
      run_P = np.searchsorted(start_R, token_P)
      counts.append(targets[run_P] - np.maximum(stop[run_P] - token_P, 0))
    return np.stack(counts, axis=-1)
