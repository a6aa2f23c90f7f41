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
  """Measures the frames per second of each stage alone and of both, for at least `seconds` each.

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
    has_frames = False
    for event in decoders.decode(enumerate(itertools.cycle(clips))):
      if event.frames_NxHxWx3 is not None:
        has_frames = True
        yield event.frames_NxHxWx3
      elif not has_frames and event.film >= len(clips):
        raise UserError("No film has a frame: there is nothing to measure.")

  def encoded(chunks: Iterator[np.ndarray]) -> Iterator[int]:
    """Numbers of frames in finished batches, which end with a chunk of the next one but one."""
    for chunk in chunks:
      count = sum(len(codes.codes_NxP) for codes in encoder.add(0, chunk))
      if count:
        yield count

  def rate(counts: Iterator[int]) -> float:
    """Frames per second after the first count, which waits for processes and the compiler."""
    next(counts)
    start, frames = time.monotonic(), 0
    for count in counts:
      frames += count
      if time.monotonic() >= start + seconds:
        break
    return frames / (time.monotonic() - start)

  with new_decoders() as decoders:
    chunks = decoded(decoders)
    sample_NxHxWx3 = next(chunks).copy()
    yield "decoding", rate(map(len, chunks))
  yield "encoding", rate(encoded(itertools.repeat(sample_NxHxWx3)))
  with new_decoders() as decoders:
    yield "decoding and encoding", rate(encoded(decoded(decoders)))
