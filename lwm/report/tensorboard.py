"""TensorBoard events, written by the calling thread.

tensorboardX's own writer uses a thread. On a full disk that thread dies with a stack trace, and
the next write hangs.
"""

import os
import pathlib
import time

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

_FLUSH_SECONDS = 10


class EventFile:
  """A new file of scalars in a directory of event files."""

  def __init__(self, directory: pathlib.Path, purge_step: int):
    """TensorBoard drops events of step `purge_step` and later from older files."""
    directory.mkdir(parents=True, exist_ok=True)
    # tensorboardX names files by the second, which is not unique.
    self._writer = EventsWriter(os.fspath(directory / "events"), f".{time.time_ns()}")
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(step=purge_step, session_log=start))
    self._flushed = time.monotonic()

  def add_scalar(self, name: str, value: float, step: int) -> None:
    self._write(event_pb2.Event(step=step, summary=summary.scalar(name, value)))
    if time.monotonic() > self._flushed + _FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    self._writer.close()

  def _write(self, event: event_pb2.Event) -> None:
    event.wall_time = time.time()
    self._writer.write_event(event)
