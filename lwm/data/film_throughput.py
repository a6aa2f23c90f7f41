"""How fast films are decoded, encoded, and both at the same time."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lwm.data.films import Film
from lwm.errors import UserError
from lwm.vision.decoders import Decoders
from lwm.vision.frame_encoder import FrameEncoder


def throughput(
  films: Sequence[Film], new_decoders: Callable[[], Decoders], encoder: FrameEncoder, seconds: float
) -> Iterator[tuple[str, float]]:
  """Measures the frames per second of each stage alone and of both, for about `seconds` each.

  Args:
    films: are decoded again and again.
    new_decoders: starts the processes, once for each measurement.
    encoder: encodes.
    seconds: per measurement.

  Yields:
    The name of what was measured, and frames per second.

  Raises:
    UserError: no film has a frame.
  """
  clips = [clip for film in films if not film.problem for clip in film.clips]

  def decoded(decoders: Decoders) -> Iterator[np.ndarray]:
    """Frames until the time is over, which begins with the first."""
    stop = None
    for event in decoders.decode(enumerate(itertools.cycle(clips))):
      if event.frames_NxHxWx3 is not None:
        stop = stop or time.monotonic() + seconds
        yield event.frames_NxHxWx3
      elif stop is None and event.film >= len(clips):
        raise UserError("No film has a frame: there is nothing to measure.")
      if stop and time.monotonic() >= stop:
        return

  with new_decoders() as decoders:
    frames = decoded(decoders)
    sample_NxHxWx3 = next(frames).copy()
    start = time.monotonic()
    count = sum(len(chunk) for chunk in frames)
    yield "decoding", count / (time.monotonic() - start)

  def encode(chunks: Iterator[np.ndarray]) -> float:
    start, count = time.monotonic(), 0
    for chunk in chunks:
      count += len(chunk)
      for _ in encoder.add(0, chunk):
        pass
    for _ in encoder.flush():
      pass
    return count / (time.monotonic() - start)

  encode(itertools.repeat(sample_NxHxWx3, 1))  # Compiles.
  stop = time.monotonic() + seconds
  again = itertools.repeat(sample_NxHxWx3)
  yield "encoding", encode(itertools.takewhile(lambda _: time.monotonic() < stop, again))
  with new_decoders() as decoders:
    frames = decoded(decoders)
    next(frames)
    yield "decoding and encoding", encode(frames)
