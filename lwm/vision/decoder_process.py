"""Decodes films one at a time in a process of its own, into buffers that another process shares.

`lwm.vision.decoders` starts this program. It imports neither JAX nor anything else that starts
threads, because PyAV can hang beside them. Its frames go to buffers that exist before the first
film, because PyAV leaks when memory is taken while it decodes.

Legend: B buffers, N frames per buffer, H and W height and width in pixels.
"""

import contextlib
import mmap
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from lwm.errors import UserError
from lwm.vision.video import crop_and_resize, read_frames

# Address space of a decoder: enough for films of 8K, and a bound for files that claim any size.
_MOST_MEMORY = 6 << 30


class Settings(NamedTuple):
  """How films are decoded, and the shape of the buffers."""

  resolution: int
  frames_per_second: float
  max_frames: int
  timeout: float
  num_buffers: int
  frames_per_buffer: int

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the buffers: [B, N, H, W, 3]."""
    return self.num_buffers, self.frames_per_buffer, self.resolution, self.resolution, 3


class Clip(NamedTuple):
  """A film, or the part of it between two times in seconds."""

  path: str
  start: float = 0.0
  end: float | None = None


class Frames(NamedTuple):
  """Message to the parent: a buffer holds the next `num_frames` frames."""

  buffer: int
  num_frames: int


class End(NamedTuple):
  """Message to the parent: the film has ended, and why if it is bad."""

  problem: str = ""


def open_buffers(descriptor: int, settings: Settings) -> np.ndarray:
  """The shared buffers, uint8 [B, N, H, W, 3]."""
  memory = mmap.mmap(descriptor, int(np.prod(settings.shape)))
  return np.ndarray(settings.shape, np.uint8, buffer=memory)


def _decode_clips(connection: Connection, buffers: np.ndarray, settings: Settings) -> None:
  """Decodes the clips that come over the connection.

  The parent sends clips, and the numbers of buffers whose frames it has taken.
  """
  free = list(range(settings.num_buffers))

  def next_buffer() -> int:
    # Waiting for the parent is no hang.
    signal.setitimer(signal.ITIMER_REAL, 0)
    while not free:
      free.append(connection.recv())
    signal.setitimer(signal.ITIMER_REAL, settings.timeout)
    return free.pop()

  while True:
    message: Any = connection.recv()
    if isinstance(message, int):
      free.append(message)
    else:
      problem = _decode(message, connection, buffers, settings, next_buffer)
      signal.setitimer(signal.ITIMER_REAL, 0)
      connection.send(End(problem))


def _decode(
  clip: Clip,
  connection: Connection,
  buffers: np.ndarray,
  settings: Settings,
  next_buffer: Callable[[], int],
) -> str:
  """Decodes a clip; returns why it is bad, or nothing."""
  buffer, count, total = next_buffer(), 0, 0
  try:
    frames = read_frames(
      clip.path, settings.frames_per_second, start=clip.start, end=clip.end, threads=1
    )
    for image in frames:
      if total == settings.max_frames:
        raise UserError(
          f"more than {total} frames: give it an end in a manifest, or raise --max_frames."
        )
      if count == settings.frames_per_buffer:
        connection.send(Frames(buffer, count))
        buffer, count = next_buffer(), 0
      buffers[buffer, count] = crop_and_resize(image, settings.resolution)
      count, total = count + 1, total + 1
      # The process dies of this signal if the next frame does not come in time.
      signal.setitimer(signal.ITIMER_REAL, settings.timeout)
  except UserError as error:
    # The report names the film.
    return str(error).removeprefix(f"{clip.path} ")
  except MemoryError:
    return f"a frame needs more than {_MOST_MEMORY >> 30} GiB"
  except Exception as error:  # FFmpeg, PyAV and Pillow raise all kinds for damaged files.
    return f"{type(error).__name__}: {error}"
  finally:
    connection.send(Frames(buffer, count))
  return ""


def run(connection_descriptor: int, buffers_descriptor: int) -> None:
  """The process: reads the settings and then clips from the connection until the parent ends."""
  # The parent handles Ctrl-C.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
  # A crash is reported; it needs no core file.
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
    with Connection(connection_descriptor) as connection:
      settings = connection.recv()
      _decode_clips(connection, open_buffers(buffers_descriptor, settings), settings)
