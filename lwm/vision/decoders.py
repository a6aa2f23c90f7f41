"""Films to frames in processes of their own, one film at a time each.

A film that hangs or crashes its decoder ends that process and no other; the next film gets a new
one. See `lwm.vision.decoder_process`.

Legend: N frames, H height, W width in pixels.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from multiprocessing import connection as connections
from typing import NamedTuple, Self

import numpy as np

from lwm.vision.decoder_process import Clip, End, Frames, Settings, open_buffers

# One is filled while the other waits to be taken, and one more for uneven films.
_BUFFERS = 3
_BYTES_PER_BUFFER = 4 << 20
# More would come late.
_MOST_FRAMES_PER_BUFFER = 32


def settings(
  resolution: int, frames_per_second: float, max_frames: int, timeout: float
) -> Settings:
  """How to decode, with buffers of at most 32 frames and about 4 MB.

  Args:
    resolution: pixels along one side of the square that is cut from each frame.
    frames_per_second: see `lwm.vision.video.read_frames`.
    max_frames: a film with more is bad.
    timeout: seconds without a frame after which a film is bad.
  """
  frames = min(max(1, _BYTES_PER_BUFFER // (resolution**2 * 3)), _MOST_FRAMES_PER_BUFFER)
  return Settings(resolution, frames_per_second, max_frames, timeout, _BUFFERS, frames)


class Decoded(NamedTuple):
  """What comes of a film: frames, its end, or the reason why it is bad.

  Attributes:
    film: its index.
    frames_NxHxWx3: uint8, valid until the next event; None at the end of the film.
    problem: why the film is bad; empty if it is not.
  """

  film: int
  frames_NxHxWx3: np.ndarray | None
  problem: str = ""


class Decoders:
  """Processes that decode films. Use it in a `with`, at the end of which they have ended."""

  def __init__(self, count: int, decoding: Settings):
    """
    Args:
      count: number of processes.
      decoding: made by `settings`.
    """
    self._decoding = decoding
    self._processes = [_Decoder(decoding) for _ in range(count)]

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    error_type: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    for process in self._processes:
      process.end()

  def decode(self, films: Iterator[tuple[int, Clip]]) -> Iterator[Decoded]:
    """Decodes films, given with their indices; their frames come mixed, those of a film in order.

    A film is taken from `films` when a decoder has nothing to do.
    """
    at_work: dict[connections.Connection, tuple[_Decoder, int]] = {}
    idle = list(self._processes)
    while True:
      while idle and (film := next(films, None)) is not None:
        index, clip = film
        decoder = idle.pop()
        decoder.start(clip)
        at_work[decoder.connection] = decoder, index
      if not at_work:
        return
      for ready in connections.wait(list(at_work)):
        assert isinstance(ready, connections.Connection)
        decoder, index = at_work[ready]
        message = decoder.receive()
        if isinstance(message, Frames):
          if message.num_frames:
            yield Decoded(index, decoder.buffers[message.buffer, : message.num_frames])
          decoder.give_back(message.buffer)
        else:
          del at_work[ready]
          idle.append(decoder)
          yield Decoded(index, None, message.problem)


class _Decoder:
  """A process that decodes, and a new one whenever it has died."""

  def __init__(self, decoding: Settings):
    self._decoding = decoding
    self._descriptor = _shared_memory(int(np.prod(decoding.shape)))
    self.buffers = open_buffers(self._descriptor, decoding)
    self._process: subprocess.Popen | None = None
    self.connection: connections.Connection

  def start(self, clip: Clip) -> None:
    if self._process is not None and self._process.poll() is not None:
      self.end()  # It was killed while it had nothing to do.
    if self._process is None:
      self._start_process()
    self.connection.send(clip)

  def _start_process(self) -> None:
    self.connection, child = connections.Pipe()
    descriptors = child.fileno(), self._descriptor
    program = f"from lwm.vision import decoder_process; decoder_process.run{descriptors}"
    self._process = subprocess.Popen(
      [sys.executable, "-c", program],
      pass_fds=descriptors,
      # Without the threads of NumPy's linear algebra.
      env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
      stdin=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    child.close()
    self.connection.send(self._decoding)

  def receive(self) -> Frames | End:
    try:
      return self.connection.recv()
    except (EOFError, OSError):
      problem = self._why_it_died()
      self.end()
      return End(problem)

  def _why_it_died(self) -> str:
    assert self._process
    status = self._process.wait()
    if status == -signal.SIGALRM:
      return f"the decoder hangs: no frame for {self._decoding.timeout:g} s"
    if status < 0:
      return f"the decoder crashed: {signal.strsignal(-status)}"
    return f"the decoder ended with status {status}"

  def give_back(self, buffer: int) -> None:
    with contextlib.suppress(OSError):  # If it has died, the next `receive` says so.
      self.connection.send(buffer)

  def end(self) -> None:
    if self._process is not None:
      self.connection.close()
      self._process.kill()
      self._process.wait()
      self._process = None


def _shared_memory(size: int) -> int:
  """The descriptor of memory without a name, which /dev/shm need not hold."""
  if hasattr(os, "memfd_create"):
    descriptor = os.memfd_create("frames")
  else:  # Not Linux.
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
  os.ftruncate(descriptor, size)
  return descriptor
