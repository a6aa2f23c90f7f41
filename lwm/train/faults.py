"""Bad steps: which steps are bad, and whether the run tolerates them. See FaultConfig."""

import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from lwm.config.experiment import FaultConfig
from lwm.errors import UserError

# (batch, loss) of a stage's good batches, in order.
LossHistory = Sequence[tuple[int, float]]


def loss_limit(faults: FaultConfig, losses: LossHistory, batch: int) -> np.float32:
  """The loss above which `batch` is a spike; infinite until there is a full window of losses.

  The batch just before is never counted, because it is usually still in flight. So the limit
  depends on the batches alone, and a resumed run judges as an undisturbed one does.
  """
  window = [loss for earlier, loss in losses if earlier < batch - 1][-faults.spike_window :]
  if not faults.spike_factor or len(window) < faults.spike_window:
    return np.float32(math.inf)
  return np.float32(faults.spike_factor * statistics.median(window))


def with_loss(
  faults: FaultConfig, losses: LossHistory, batch: int, loss: float
) -> tuple[tuple[int, float], ...]:
  """`losses` with the loss of one more good batch, shortened to what `loss_limit` needs."""
  if not faults.spike_factor:
    return ()
  return (*losses, (batch, loss))[-faults.spike_window - 1 :]


def problem(faults: FaultConfig, metrics: dict[str, Any], limit: np.float32) -> str:
  """Why a step was not applied."""
  loss, norm = (float(metrics[name]) for name in ("loss", "gradient_norm"))
  if not math.isfinite(loss):
    return f"its loss is {loss}"
  if not math.isfinite(norm):
    return f"its gradient norm is {norm}"
  return (
    f"its loss of {loss:.3f} is above {limit:.3f}, {faults.spike_factor:g} times the median of "
    f"the last {faults.spike_window}"
  )


def check_tolerated(
  faults: FaultConfig, in_a_row: int, what: str, last: pathlib.Path | None
) -> None:
  """Raises a UserError if the policy is `raise`, or if there were too many bad steps in a row.

  Args:
    faults: the policy.
    in_a_row: number of bad steps, or of rollbacks, in a row, including this one.
    what: which step is bad, and why.
    last: the last checkpoint, if there is one.
  """
  if faults.bad_step == "raise":
    raise UserError(
      f"{what}; run the same command with --config.faults.bad_step=skip or rollback to resume from "
      f"{last or 'the start'} and skip this batch."
    )
  if in_a_row > faults.max_in_a_row:
    raise UserError(
      f"{what}, after {faults.max_in_a_row} others in a row (config.faults.max_in_a_row): look at "
      f"the data and the learning rate; the last checkpoint is {last or 'the start'}."
    )
