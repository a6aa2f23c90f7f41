"""Bad steps and bad disks: which they are, and what is said of them. See FaultConfig."""

import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from lwm.config.experiment import FaultConfig
from lwm.errors import UserError

# Batches of a stage and their losses.
LossHistory = Sequence[tuple[int, float]]


def loss_limit(faults: FaultConfig, losses: LossHistory, batch: int) -> np.float32:
  """The loss above which `batch` is a spike; infinite until there is a whole window of losses.

  It never counts the batch just before, which is mostly still in flight: so it is a function of
  the batches alone, and a resumed run judges as an undisturbed one.
  """
  window = [loss for earlier, loss in losses if earlier < batch - 1][-faults.spike_window :]
  if not faults.spike_factor or len(window) < faults.spike_window:
    return np.float32(math.inf)
  return np.float32(faults.spike_factor * statistics.median(window))


def with_loss(
  faults: FaultConfig, losses: LossHistory, batch: int, loss: float
) -> tuple[tuple[int, float], ...]:
  """`losses` and that of a good batch; as many as `loss_limit` will ask for."""
  if not faults.spike_factor:
    return ()
  return (*losses, (batch, loss))[-faults.spike_window - 1 :]


def problem(faults: FaultConfig, metrics: dict[str, Any], limit: float) -> str:
  """What is wrong with a step that was not applied."""
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
  """Raises a UserError if the policy is to raise, or this bad step is one too many.

  Args:
    faults: the policy.
    in_a_row: bad steps, or times rolled back, with this one.
    what: which step is bad, and why.
    last: where the last checkpoint is.
  """
  if faults.bad_step == "raise":
    raise UserError(
      f"{what}; the same command goes on from {last or 'the start'}, with "
      "--config.faults.bad_step=skip or rollback past this batch."
    )
  if in_a_row > faults.max_in_a_row:
    raise UserError(
      f"{what}, after {faults.max_in_a_row} such in a row (config.faults.max_in_a_row): look at "
      f"the data and the learning rate; the last checkpoint is {last or 'the start'}."
    )
