"""Stopping when told to: SIGTERM, a preemption notice or Ctrl-C."""

import os
import signal

import jax
from jax.experimental import multihost_utils


class StopNotice:
  """Says before which step a run that was told to stop does so; the same one on all processes.

      with StopNotice() as notice:
        while not notice.reached():
          ...

  One process heeds its own SIGTERM and SIGINT. Of several, whichever is told tells the others
  through JAX's preemption service, which also agrees on the step. A second SIGINT stops at once;
  more SIGTERMs change nothing, for launchers send them freely.

  Attributes:
    reason: why the run stops; None as long as it does not.
  """

  def __init__(self):
    self.reason = None
    self._signal = None
    self._asked = 0
    self._several = jax.process_count() > 1

  def __enter__(self) -> "StopNotice":
    # JAX has taken SIGTERM for itself where there are several processes.
    signals = [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
    self._handlers = {number: signal.signal(number, self._note) for number in signals}
    return self

  def __exit__(self, error_type, error, traceback) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame) -> None:
    del frame
    self._signal = signal.Signals(number).name
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)

  def reached(self) -> bool:
    """Whether to stop before the next step: to be asked before each one."""
    if self._several:
      # The processes agree on the number after the highest that one has asked for, 0 before the
      # first. Steps do not start there when a run resumes, and come again after a rollback.
      self._asked += 1
      reached = multihost_utils.reached_preemption_sync_point(self._asked)
    else:
      reached = self._signal is not None
    if reached:
      self.reason = self._signal or "preemption notice"
    return reached
