"""Traces of chosen steps for xprof: what hosts and devices did, kernel by kernel."""

import pathlib
import re
from collections.abc import Callable

import jax

from lwm.errors import UserError
from lwm.report.goodput import Account


def parse_steps(text: str) -> range:
  """The steps that `A:B` means: A to B - 1, counted over all stages as total_steps in metrics are.

  Raises:
    UserError: the text is something else.
  """
  match = re.fullmatch(r"(\d+):(\d+)", text)
  steps = range(int(match[1]), int(match[2])) if match else range(0)
  if not steps or not steps[0]:
    raise UserError(
      f"--profile_steps={text}: give two of the run's steps, 10:13 for the steps 10, 11 and 12; "
      "the first of all is 1."
    )
  return steps


class Profiler:
  """Traces steps into WORKDIR/profile; outside of them it does nothing but name the steps.

  A trace begins with the dispatch of its first step and ends when the results of its last are
  there; the steps that are then in flight are in it in part.
  """

  def __init__(
    self, workdir: pathlib.Path, steps: range, account: Account, say: Callable[[str], None]
  ):
    """
    Args:
      workdir: of the run.
      steps: to trace, counted over all stages from 1; none if empty.
      account: the time that starting and ending take is booked there.
      say: tells the person at the terminal.
    """
    # Hosts write files of their own name, and several processes may share a host.
    self._folder = workdir / "profile"
    if jax.process_count() > 1:
      self._folder /= f"process_{jax.process_index()}"
    self._steps, self._account, self._say = steps, account, say
    self._traces = False

  def step(self, total_steps: int) -> jax.profiler.StepTraceAnnotation:
    """Marks the dispatch of a step, with a trace begun if it is one of those to be traced."""
    if not self._traces and total_steps in self._steps:
      self._start(total_steps)
    elif not self._traces and self._steps and total_steps > self._steps[-1]:
      self._say(f"--profile_steps: nothing to trace, for the run is at step {total_steps} already")
      self._steps = range(0)
    return jax.profiler.StepTraceAnnotation("train", step_num=total_steps)

  def finished(self, total_steps: int) -> None:
    """Writes the trace if the results of its last step have come."""
    if self._traces and total_steps >= self._steps[-1]:
      self.close()

  def close(self) -> None:
    """Writes what has been traced so far."""
    if not self._traces:
      return
    with self._account.spend("other"):
      jax.profiler.stop_trace()
    self._traces, self._steps = False, range(0)
    self._say(f"profile: xprof --logdir={self._folder} (pip install xprof)")

  def _start(self, total_steps: int) -> None:
    options = jax.profiler.ProfileOptions()
    # Calls of Python functions would take more time than the steps leave.
    options.python_tracer_level = 0
    options.session_id = f"steps_{total_steps}_to_{self._steps[-1]}"
    with self._account.spend("other"):
      jax.profiler.start_trace(self._folder, profiler_options=options)
    self._traces = True
