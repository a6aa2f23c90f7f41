"""Goodput: where the wall time of a run goes, over all attempts.

Every second since the first attempt began belongs to one category:

    step        a device runs steps that count in the end
    input       the device of process 0 has nothing to run because the next batch is not ready
    compile     the step of a stage is compiled
    evaluation  held-out loss
    checkpoint  steps wait for a checkpoint's copy, or the end of the run waits for the last one
    restart     from the last step of a killed attempt to the first of the next; steps repeated
                after a kill or a rollback; bad steps that are skipped
    other       everything else: parameters made or moved between stages, profiles, curves

An attempt begins when `train` is called, after programs are loaded and hosts have met. What a
killed attempt spent is read from its records (lwm/report/metrics.py): its last goodput record, and
the steps after it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lwm.report.terminal import duration

CATEGORIES = ("step", "input", "compile", "evaluation", "checkpoint", "restart", "other")

_EPOCH = time.time() - time.perf_counter()


def wall_clock() -> float:
  """Seconds since 1970. Within a process, corrections of the system clock do not make it jump."""
  return _EPOCH + time.perf_counter()


class Account:
  """A stopwatch that charges each lap to a category, so that categories sum to the time passed.

  Attributes:
    seconds: time per category so far.
    attempts: number of attempts at the run, including this one.
  """

  def __init__(self, clock: Callable[[], float] = wall_clock):
    self.seconds = dict.fromkeys(CATEGORIES, 0.0)
    self.attempts = 1
    self._clock = clock
    self._last = clock()
    self._restarting = False

  @classmethod
  def resumed(
    cls,
    records: Sequence[dict[str, Any]],
    total_steps: int,
    clock: Callable[[], float] = wall_clock,
  ) -> "Account":
    """The account of a run that left `records` and resumes after step `total_steps`.

    Time after the last record, up to the first new step, is charged to `restart`.
    """
    account = cls(clock)
    for record in records:
      if record["kind"] == "goodput":
        account.seconds = {name: record[f"{name}_seconds"] for name in CATEGORIES}
        account.attempts = record["attempts"] + 1
        account._last = record["time"]
        account._restarting = True
      elif record["kind"] == "train" and account.attempts > 1:
        account._last += record["seconds"]
        account.seconds["step"] += record["seconds"] - record["starved_seconds"]
        account.seconds["input"] += record["starved_seconds"]
    if account.attempts > 1:
      account.forget_steps(records, total_steps)
    return account

  def forget_steps(self, records: Sequence[dict[str, Any]], total_steps: int) -> None:
    """Charges recorded steps after `total_steps` to `restart`: they will run again."""
    for record in records:
      if record["kind"] == "train" and record["total_steps"] > total_steps:
        self.move("step", "restart", record["seconds"] - record["starved_seconds"])
        self.move("input", "restart", record["starved_seconds"])

  def lap(self, category: str) -> float:
    """Charges the time since the last lap to `category`, and returns it in seconds."""
    now = self._clock()
    # A run may resume on a host whose clock is behind.
    seconds, self._last = max(0.0, now - self._last), now
    self.seconds["restart" if self._restarting else category] += seconds
    return seconds

  @contextlib.contextmanager
  def spend(self, category: str) -> Iterator[None]:
    """Charges the time of the block to `category`. Blocks do not nest."""
    self.lap("other")
    yield
    self.lap(category)

  def steps_begin(self) -> None:
    """The next lap is a step."""
    self.lap("other")
    self._restarting = False

  def move(self, source: str, target: str, seconds: float) -> None:
    """Moves time from one category to another."""
    self.seconds[source] -= seconds
    self.seconds[target] += seconds

  def record(self, total_steps: int) -> dict[str, Any]:
    """The goodput record as of the last lap: see lwm/report/metrics.py."""
    wall = sum(self.seconds.values())
    return {
      "kind": "goodput",
      "total_steps": total_steps,
      "time": self._last,
      "attempts": self.attempts,
      "wall_seconds": wall,
      "goodput": self.seconds["step"] / wall if wall else 0.0,
    } | {f"{name}_seconds": seconds for name, seconds in self.seconds.items()}


def table(record: dict[str, Any]) -> str:
  """A goodput record as lines of text, without categories that took no time."""
  wall = record["wall_seconds"]
  attempts = f" in {record['attempts']} attempts" if record["attempts"] > 1 else ""
  lines = [f"goodput {record['goodput']:.1%} of {duration(wall)}{attempts}"]
  for name in CATEGORIES:
    seconds = record[f"{name}_seconds"]
    if seconds >= 0.5:
      lines.append(f"  {name:<10} {duration(seconds):>8} {seconds / wall:>7.1%}")
  return "\n".join(lines)
