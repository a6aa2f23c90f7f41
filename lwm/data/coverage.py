"""What the rows of a stage hold of a dataset: told when the stage starts, or an error.

R rows; a trailing 2 is the modality.
"""

import numpy as np

from lwm.config.batch import MODALITIES
from lwm.config.experiment import Experiment, Stage
from lwm.data.dataset import Split
from lwm.data.long_documents import kept
from lwm.data.rows import Rows
from lwm.errors import UserError


def coverage(rows: Rows, used_R: np.ndarray, policy: str) -> str:
  """How many documents are longer than a row, what is dropped, and how many rows hold no target.

  Args:
    rows: the rows of a split of a dataset.
    used_R: indices of the rows that are used.
    policy: the dataset's `long_documents`.
  """
  split, kept, row_length = rows.split, rows.kept, rows.plan.sequence_length
  long = int((split.lengths > row_length).sum())
  parts = [f"documents longer than a row of {row_length:,} tokens: {long:,} of {len(split):,}"]
  if long:
    parts[0] += f" (long_documents={policy!r})"
  tokens, targets = int(split.lengths.sum()), int(split.targets.sum())
  dropped = tokens - int(kept.length_D.sum())
  if dropped:
    parts.append(
      f"dropped: {dropped:,} of {tokens:,} tokens, "
      f"{targets - int(kept.targets_Dx2.sum()):,} of {targets:,} targets"
    )
  holds_R = rows.hold_targets()
  if holds_R is None:
    parts.append(
      f"rows without a target: unknown, because an older version prepared {split.path}; prepare "
      "it again to see them"
    )
  else:
    empty = int((~holds_R[used_R]).sum())
    parts.append(f"rows without a target: {empty:,} of {len(used_R):,}")
    if empty:
      parts[-1] += f" ({empty / len(used_R):.1%})"
    if empty and policy == "cut":
      parts.append("to keep examples whole, set long_documents to 'leave_out' or 'keep_end'")
  return "; ".join(parts)


def check_learnable(experiment: Experiment, stage: Stage, dataset: str, split: Split) -> None:
  """Raises UserError, naming the setting to change, if nothing would be learnt from a dataset.

  Args:
    experiment: has the dataset and the weights of the losses.
    stage: the stage that trains on the dataset.
    dataset: the dataset's name.
    split: the dataset's training documents.
  """
  [(index, config)] = [
    (index, config) for index, config in enumerate(experiment.datasets) if config.name == dataset
  ]
  nothing = f"Stage {stage.name!r} would learn nothing from dataset {dataset!r} ({split.path}): "
  targets_Dx2 = kept(split, stage.sequence_length, config.long_documents).targets_Dx2
  present_2 = targets_Dx2.sum(axis=0) > 0
  if not present_2.any():
    long = int((split.lengths > stage.sequence_length).sum())
    raise UserError(
      f"{nothing}{long:,} of {len(split):,} documents are longer than its sequence_length="
      f"{stage.sequence_length}, and config.datasets[{index}].long_documents="
      f"{config.long_documents!r} keeps none of the targets; set another value, or a larger "
      "sequence_length."
    )
  present = [modality for modality, has_any in zip(MODALITIES, present_2) if has_any]
  if not any(getattr(experiment.loss, f"{modality}_weight") for modality in present):
    names = " and ".join(f"config.loss.{modality}_weight" for modality in present)
    raise UserError(
      f"{nothing}all of its targets are {' or '.join(present)}, and {names} is 0; give them a "
      "weight, or take the dataset out of the stage's mixture."
    )
