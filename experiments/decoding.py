"""Flags and progress lines of programs that decode films."""

import os
import time
from collections.abc import Callable

from absl import flags

from lwm.data.film_job import PartReport
from lwm.vision import decoders

FRAMES_PER_SECOND = flags.DEFINE_float(
  "frames_per_second", 4.0, "Frames to take per second of film; LWM takes 4.", lower_bound=1e-6
)
MAX_FRAMES = flags.DEFINE_integer(
  "max_frames", 100_000, "A film with more frames is reported as bad.", lower_bound=1
)
TIMEOUT = flags.DEFINE_float(
  "timeout",
  60.0,
  "A film is reported as bad if the decoder gives no frame for this many seconds.",
  lower_bound=1e-3,
)
DECODERS = flags.DEFINE_integer(
  "decoders", os.cpu_count() or 1, "Processes; each decodes one film at a time.", lower_bound=1
)
FILMS_PER_PART = flags.DEFINE_integer(
  "films_per_part",
  64,
  "Films to write at a time; a killed command makes its unfinished parts again.",
  lower_bound=1,
)


def new_decoders(resolution: int) -> decoders.Decoders:
  """Decoders of squares of `resolution` pixels along one side."""
  decoding = decoders.settings(resolution, FRAMES_PER_SECOND.value, MAX_FRAMES.value, TIMEOUT.value)
  assert DECODERS.value  # It has a default.
  return decoders.Decoders(DECODERS.value, decoding)


def part_printer(num_parts: int) -> Callable[[PartReport], None]:
  """Prints a line for each completed part."""
  start = time.monotonic()
  frames = parts = 0

  def report(part: PartReport) -> None:
    nonlocal frames, parts
    frames, parts = frames + part.frames, parts + 1
    rate = frames / (time.monotonic() - start)
    print(
      f"part {part.number}: {part.films:,} films, {part.bad_films:,} of them bad, "
      f"{part.frames:,} frames; {parts:,} of {num_parts:,} parts, {rate:,.0f} frames/s",
      flush=True,
    )

  return report
