"""Measures how long a compiled function takes, and describes how it fails."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

ROUNDS = 3
SECONDS_PER_ROUND = 0.2


def failure(error: Exception) -> str:
  """The type and the first line of an error."""
  return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"


def seconds(function: Callable, *arguments: Any) -> float:
  """Seconds per call, in the best of several rounds: other load on the machine only adds time."""
  function = jax.jit(function)

  def run(calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
      result = function(*arguments)
    jax.block_until_ready(result)
    return time.perf_counter() - start

  run(1)
  calls = max(1, round(SECONDS_PER_ROUND / run(1)))
  return min(run(calls) for _ in range(ROUNDS)) / calls


def seconds_in_turn(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
  """Seconds of each call, the median of rounds that make all calls in turn.

  Other load on the machine slows all of them down alike, so their ratios are reliable.
  """
  taken = [[_seconds_of(call) for call in calls] for _ in range(rounds + 1)]
  # The first round compiles.
  return [statistics.median(times) for times in zip(*taken[1:])]


def _seconds_of(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start
