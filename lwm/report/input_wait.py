"""Whether input is what the steps wait for, and on which host.

Hosts read ahead, so waiting for a batch costs nothing while the device still runs the step before.
What counts is how long a device had nothing to run; in a run of many processes the others then
wait for it in their collectives, and do not see why.
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

# Steps between two looks, and the share of their time that is worth a word.
STEPS = 20
SHARE = 0.2
_KEYS = "lwm/input_wait/"


class InputWait:
  """The wait for a step's batch, and a thread that notes when the step's results are there.

  Waiting for results on a thread of its own holds up neither the device nor the loop.
  """

  def __init__(
    self, asked: float, came: float, results: Any, clock: Callable[[], float] = wall_clock
  ):
    """
    Args:
      asked: when the batch was asked for.
      came: when it was there.
      results: arrays that the step returns.
      clock: that both times are of.
    """
    self.seconds = came - asked
    self._asked, self._came, self._clock = asked, came, clock
    self._thread = threading.Thread(target=self._watch, args=(results,), daemon=True)
    self._thread.start()

  def _watch(self, results: Any) -> None:
    # Who reads the results is told what went wrong.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      jax.block_until_ready(results)
    self._finished = self._clock()

  def starved(self, before: "InputWait | None") -> float:
    """Seconds of the wait in which the step `before`, if there was one, had ended."""
    if before is None:
      return self.seconds
    before._thread.join()
    return max(0.0, self._came - max(self._asked, before._finished))


class InputWatch:
  """Adds up the waits of this process, and says on process 0 whose are too long.

  Processes tell each other through the key-value store of JAX's coordination service, which no
  device takes part in. Each process is named once.
  """

  def __init__(self, say: Callable[[str], None]):
    self._say = say
    self._named = set()
    self._steps, self._seconds, self._starved = 0, 0.0, 0.0

  def step(self, seconds: float, starved: float) -> None:
    """Counts a step of which the device stood idle for `starved`."""
    self._steps += 1
    self._seconds += seconds
    self._starved += starved
    if self._steps == STEPS:
      self._look(self._seconds / STEPS, self._starved / STEPS)
      self._steps, self._seconds, self._starved = 0, 0.0, 0.0

  def _look(self, seconds: float, starved: float) -> None:
    waits = shared_waits(starved)
    text = notice(waits, seconds)
    process = max(waits, key=waits.get)
    if text and process not in self._named:
      self._named.add(process)
      self._say(text)


def shared_waits(starved: float) -> dict[str, float]:
  """Tells process 0 of this process's wait, and returns the newest of all processes by name.

  Others than process 0 see their own alone. A store that does not answer is no reason to stop.
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
  """What to say of waits, by process, of steps that take `seconds`; None if they are short."""
  process = max(waits, key=waits.get)
  longest, median = waits[process], statistics.median_low(waits.values())
  if longest < SHARE * seconds:
    return None
  if longest < 2 * median:
    return (
      f"input holds up the steps: devices idle for {longest:.2f} s of {seconds:.2f} s, waiting "
      "for batches; raise config.data.threads, or put the data on a faster disk"
    )
  return (
    f"input of {process} holds up the others: {longest:.2f} s of a step's {seconds:.2f} s, "
    f"against {median:.2f} s at the median"
  )
