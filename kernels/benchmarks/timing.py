"""How long a compiled function takes, or how it fails."""

import time

import jax

ROUNDS = 3
SECONDS_A_ROUND = 0.2


def failure(error: Exception) -> str:
  """What went wrong, on one line."""
  return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"


def seconds(function, *arguments) -> float:
  """Of one call, in the best of some rounds of calls: what else the machine does only adds time."""
  function = jax.jit(function)

  def run(calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
      result = function(*arguments)
    jax.block_until_ready(result)
    return time.perf_counter() - start

  run(1)
  calls = max(1, round(SECONDS_A_ROUND / run(1)))
  return min(run(calls) for _ in range(ROUNDS)) / calls
