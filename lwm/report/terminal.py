"""What a run prints: one line per step, and a progress bar on a terminal."""

import sys
from typing import Any

import tqdm

from lwm.report.presentation import Presentation


class ProgressLine:
  """One line per step on stdout and, on a terminal, a bar for the whole run below them."""

  def __init__(self, presentation: Presentation, *, steps_done: int, steps: int, units_ahead: int):
    """`units_ahead`: units in all remaining steps, to estimate the remaining time."""
    self._presentation = presentation
    self._units_ahead = units_ahead
    self._units_per_second: float | None = None
    self._bar = tqdm.tqdm(
      initial=steps_done,
      total=steps,
      disable=not sys.stderr.isatty(),
      bar_format="{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}  {elapsed}{postfix}",
      dynamic_ncols=True,
      leave=False,
    )

  def step(self, record: dict[str, Any], *, stage_steps: int, batch_units: int) -> None:
    """Prints a train record (see lwm/report/metrics.py)."""
    self._units_ahead -= batch_units
    speed = batch_units / record["seconds"]
    # An exponential average: the first step of a stage may include warming up.
    previous = self._units_per_second or speed
    self._units_per_second = 0.9 * previous + 0.1 * speed
    eta = duration(self._units_ahead / self._units_per_second)
    self.say(step_line(self._presentation, record, stage_steps, eta))
    self._bar.set_postfix_str(f"{eta} left", refresh=False)
    self._bar.update()

  def say(self, text: str) -> None:
    """Prints text above the bar."""
    self._bar.write(text, file=sys.stdout)
    sys.stdout.flush()

  def close(self) -> None:
    """Removes the bar."""
    self._bar.close()


def step_line(
  presentation: Presentation, record: dict[str, Any], stage_steps: int, eta: str
) -> str:
  """A train record as one line of text."""
  parts = [f"{record['stage']} {record['step']:>{len(str(stage_steps))}}/{stage_steps}"]
  parts.append(f"loss {record['loss']:.3f}")
  parts += presentation.columns(record)
  parts.append(f"grad {record['gradient_norm']:.2f}")
  parts.append(f"lr {record['learning_rate']:.1e}")
  parts.append(f"{record['seconds']:.2f} s")
  unit = presentation.unit
  parts.append(f"{count(record[f'{unit.name}_per_second'])} {unit.per_second}")
  if "mfu" in record:
    parts.append(f"MFU {record['mfu']:.1%}")
  parts.append(f"{eta} left")
  return " | ".join(parts)


def duration(seconds: float) -> str:
  """Seconds as 12s, 3m20s, 1h05m or 2d03h."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m{seconds % 60:02d}s"
  if seconds < 86400:
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
  return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def count(value: float) -> str:
  """A number as 987, 12.3k or 4.56M."""
  for unit, size in (("M", 1e6), ("k", 1e3)):
    if value >= size:
      return f"{value / size:.3g}{unit}"
  return f"{value:.0f}"
