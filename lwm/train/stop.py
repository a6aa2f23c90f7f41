"""Stopping on request: SIGTERM, a preemption notice or Ctrl-C."""

import os
import signal

import jax
from jax.experimental import multihost_utils


class StopNotice:
  """Says before which step a run must stop; all processes stop before the same step.

      with StopNotice() as notice:
        while not notice.reached():
          ...

  A single process watches its own SIGTERM and SIGINT. With several processes, the one that gets a
  signal tells the others through JAX's preemption service, which also agrees on the step. A second
  SIGINT stops at once; further SIGTERMs change nothing, because launchers may send several.

  Attributes:
    reason: why the run stops, or None while it does not.
  """

  def __init__(self):
    self.reason: str | None = None
    self._signal: str | None = None
    self._asked = 0
    self._several = jax.process_count() > 1

  def __enter__(self) -> "StopNotice":
    # With several processes, JAX handles SIGTERM itself.
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
    """Whether to stop before the next step. Ask once before each step."""
    if self._several:
      # The processes agree on the number after the highest that any of them has asked about, which
      # starts at 0. Step numbers would not do: a resumed run starts later, and a rollback repeats.
      self._asked += 1
      reached = multihost_utils.reached_preemption_sync_point(self._asked)
    else:
      reached = self._signal is not None
    if reached:
      self.reason = self._signal or "preemption notice"
    return reached
