"""Whether steps wait for input, and on which host.

Hosts read ahead, so waiting for a batch costs nothing while the device still runs the step before.
What counts is the time in which a device has nothing to run. In a run of many processes the other
ones then wait in their collectives, and cannot see why.
"""

import contextlib
import socket
import statistics
import threading
from collections.abc import Callable
from typing import Any

import jax

from lwm.parallel import coordination
from lwm.report.goodput import wall_clock

# Steps between two checks, and the share of their time from which on input is reported as slow.
STEPS = 20
SHARE = 0.2
_KEYS = "lwm/input_wait/"


class InputWait:
  """The wait for a step's batch, and a thread that notes when the step's results are ready.

  Waiting for the results on a separate thread delays neither the device nor the loop.
  """

  def __init__(
    self, asked: float, came: float, results: Any, clock: Callable[[], float] = wall_clock
  ):
    """
    Args:
      asked: when the batch was asked for.
      came: when the batch arrived.
      results: arrays that the step returns.
      clock: the clock of both times.
    """
    self.seconds = came - asked
    self._asked, self._came, self._clock = asked, came, clock
    # No daemon: Python would end it inside JAX's code, which aborts the process.
    self._thread = threading.Thread(target=self._watch, args=(results,))
    self._thread.start()

  def _watch(self, results: Any) -> None:
    # An error reaches whoever reads the results.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      jax.block_until_ready(results)
    self._finished = self._clock()

  def starved(self, before: "InputWait | None") -> float:
    """Seconds of the wait after the step `before`, if there was one, had finished."""
    if before is None:
      return self.seconds
    before._thread.join()
    return max(0.0, self._came - max(self._asked, before._finished))


class InputWatch:
  """Adds up the waits of this process; process 0 reports processes that wait too long.

  Processes share their waits through the key-value store of JAX's coordination service, without
  using devices. Each slow process is reported once.
  """

  def __init__(self, say: Callable[[str], None]):
    self._say = say
    self._named: set[str] = set()
    self._steps, self._seconds, self._starved = 0, 0.0, 0.0

  def step(self, seconds: float, starved: float) -> None:
    """Counts a step of `seconds`, in which the device was idle for `starved` seconds."""
    self._steps += 1
    self._seconds += seconds
    self._starved += starved
    if self._steps == STEPS:
      self._look(self._seconds / STEPS, self._starved / STEPS)
      self._steps, self._seconds, self._starved = 0, 0.0, 0.0

  def _look(self, seconds: float, starved: float) -> None:
    waits = shared_waits(starved)
    text = notice(waits, seconds)
    process = max(waits, key=lambda process: waits[process])
    if text and process not in self._named:
      self._named.add(process)
      self._say(text)


def shared_waits(starved: float) -> dict[str, float]:
  """Tells process 0 how long this process waits, and returns the waits that it knows, by process.

  Process 0 knows the newest wait of every process, the others only their own. A store that does
  not answer does not stop the run.
  """
  index = jax.process_index()
  name = f"process {index} ({socket.gethostname()})"
  waits = {name: starved}
  client = coordination.state.client
  if client is not None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      client.key_value_set(f"{_KEYS}{index}", f"{starved} {name}", allow_overwrite=True)
      for _, value in client.key_value_dir_get(_KEYS) if index == 0 else ():
        seconds, process = value.split(" ", 1)
        waits[process] = float(seconds)
  return waits


def notice(waits: dict[str, float], seconds: float) -> str | None:
  """A sentence about long waits in steps that take `seconds`; None if the waits are short."""
  process = max(waits, key=lambda process: waits[process])
  longest, median = waits[process], statistics.median_low(waits.values())
  if longest < SHARE * seconds:
    return None
  if longest < 2 * median:
    return (
      f"input is slow: devices are idle for {longest:.2f} s of {seconds:.2f} s per step, waiting "
      "for batches; raise config.data.threads, or put the data on a faster disk"
    )
  return (
    f"input of {process} is slow and delays the others: {longest:.2f} s of {seconds:.2f} s per "
    f"step, with a median of {median:.2f} s"
  )
