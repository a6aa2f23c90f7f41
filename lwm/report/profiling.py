"""Traces of chosen steps for xprof: what hosts and devices did, kernel by kernel."""

import pathlib
import re
from collections.abc import Callable

import jax

from lwm.errors import UserError
from lwm.report.goodput import Account


def parse_steps(text: str) -> range:
  """The steps in `A:B`, from A to B - 1, counted over all stages like total_steps in metrics.

  Raises:
    UserError: the text is not of this form.
  """
  match = re.fullmatch(r"(\d+):(\d+)", text)
  steps = range(int(match[1]), int(match[2])) if match else range(0)
  if not steps or not steps[0]:
    raise UserError(
      f"--profile_steps={text}: give a range of the run's steps, like 10:13 for steps 10, 11 "
      "and 12; the first step is 1."
    )
  return steps


class Profiler:
  """Traces steps into WORKDIR/profile. Other steps are only named.

  A trace begins with the dispatch of its first step and ends when the results of its last step
  arrive. Steps in flight at that moment are partly in the trace.
  """

  def __init__(
    self, workdir: pathlib.Path, steps: range, account: Account, say: Callable[[str], None]
  ):
    """
    Args:
      workdir: of the run.
      steps: to trace, counted over all stages from 1; none if empty.
      account: is charged with the time that starting and stopping a trace takes.
      say: prints a line.
    """
    # xprof names files by host, and several processes may share a host.
    self._folder = workdir / "profile"
    if jax.process_count() > 1:
      self._folder /= f"process_{jax.process_index()}"
    self._steps, self._account, self._say = steps, account, say
    self._traces = False

  def step(self, total_steps: int) -> jax.profiler.StepTraceAnnotation:
    """Goes around the dispatch of a step, and starts the trace if the step is its first."""
    if not self._traces and total_steps in self._steps:
      self._start(total_steps)
    elif not self._traces and self._steps and total_steps > self._steps[-1]:
      self._say(
        f"--profile_steps: nothing to trace, because the run is at step {total_steps} already"
      )
      self._steps = range(0)
    return jax.profiler.StepTraceAnnotation("train", step_num=total_steps)

  def finished(self, total_steps: int) -> None:
    """Writes the trace if this was its last step."""
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
    # Tracing Python calls would slow the steps down.
    options.python_tracer_level = 0
    options.session_id = f"steps_{total_steps}_to_{self._steps[-1]}"
    with self._account.spend("other"):
      jax.profiler.start_trace(self._folder, profiler_options=options)
    self._traces = True
