"""What becomes of documents that are longer than a row (`DatasetConfig.long_documents`).

D documents, S sequence_length; a trailing 2 is the modality.
"""

from typing import NamedTuple

import numpy as np

from lwm.data.dataset import Split
from lwm.errors import UserError


class Kept(NamedTuple):
  """The part of each document that rows are made of.

  Attributes:
    first_D: int64; its first token.
    length_D: int64; its tokens, 0 for a document that is left out.
    targets_Dx2: int64; its targets, by modality.
  """

  first_D: np.ndarray
  length_D: np.ndarray
  targets_Dx2: np.ndarray


def kept(split: Split, sequence_length: int, policy: str) -> Kept:
  """The parts of a split's documents that a policy keeps.

  Raises:
    UserError: the dataset is too old for the policy.
  """
  first_D, length_D, targets_Dx2 = np.zeros_like(split.lengths), split.lengths, split.targets
  long = np.flatnonzero(split.lengths > sequence_length)
  if policy == "cut" or not len(long):
    return Kept(first_D, length_D, targets_Dx2)
  length_D, targets_Dx2 = length_D.copy(), targets_Dx2.copy()
  if policy == "leave_out":
    length_D[long], targets_Dx2[long] = 0, 0
    return Kept(first_D, length_D, targets_Dx2)
  if split.target_runs is None:
    raise UserError(
      f"Dataset {split.path} was prepared by an older version, which did not record where its "
      "targets are: prepare it again to use long_documents='keep_end'."
    )
  stop = split.lengths[long]
  first_D[long], length_D[long] = stop - sequence_length, sequence_length
  # The first token of a row is never a target.
  targets_Dx2[long] = split.target_runs.count(long, first_D[long] + 1, stop)
  return Kept(first_D, length_D, targets_Dx2)
