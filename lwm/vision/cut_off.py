"""Whether a film is complete: in many formats, FFmpeg ends films that were cut without an error."""

import os
import re

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from lwm.errors import UserError

# A film that lacks more than this at its end was cut off.
_MISSING_SECONDS = 2.0
# Bytes per packet of an MPEG transport stream: plain, with time codes (M2TS), or with error
# correction.
_TRANSPORT_PACKETS = (188, 192, 204)
_GIF_TRAILER = b";"
# The object of an ASF (WMV) header that states the file's size, 40 bytes after its beginning, and
# 88 bytes after its beginning flags. The first flag says that the size is not valid.
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_HEADER_BYTES = 1 << 16


def check_complete(
  path: str | os.PathLike,
  container: InputContainer,
  stream: VideoStream,
  seconds: float,
  end: float | None,
) -> None:
  """Checks a film whose frames have ended.

  Args:
    path: of the film.
    container: at its end; may be read again.
    stream: the film's.
    seconds: when the frames ended, after the first.
    end: seconds after the first frame where the caller would have stopped, or None.

  Raises:
    UserError: the film ended long before the length that it states, or its file has no proper end.
  """
  wanted = float("inf") if end is None else end
  stated = min(_stream_seconds(container, stream), wanted)
  if not stated:
    stated = min((container.duration or 0) / av.time_base, wanted)
    if seconds + _MISSING_SECONDS < stated:
      # The container's length counts all streams, for example sound that is longer.
      seconds = max(seconds, _last_time_stamp(container))
  if seconds + _MISSING_SECONDS < stated:
    raise UserError(
      f"{path} ends after {seconds:.1f} s of {stated:.1f} s: name a complete video file."
    )
  if os.path.isfile(path) and _lacks_its_end(path, container.format.name):
    raise UserError(f"{path} is cut off after {seconds:.1f} s: name a complete video file.")


def _stream_seconds(container: InputContainer, stream: VideoStream) -> float:
  """The length that a stream states; 0 if it states none."""
  if container.format.name == "avi" and stream.frames and stream.average_rate:
    # FFmpeg derives the duration of an AVI from the bytes that exist.
    return float(stream.frames / stream.average_rate)
  if stream.duration and stream.time_base:
    return float(stream.duration * stream.time_base)
  tag = stream.metadata.get("DURATION", "")  # Of Matroska.
  if re.fullmatch(r"\d+:\d\d:\d\d(\.\d+)?", tag):
    hours, minutes, rest = tag.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)
  return 0.0


def _last_time_stamp(container: InputContainer) -> float:
  """The latest end of any stream's packets, in seconds."""
  container.seek(0)
  return max(
    (
      float((packet.pts + (packet.duration or 0)) * packet.time_base)
      for packet in container.demux()
      if packet.pts is not None and packet.time_base
    ),
    default=0.0,
  )


def _lacks_its_end(path: str | os.PathLike, format_name: str) -> bool:
  """Whether a file is cut off, for formats in which FFmpeg derives the length from the file."""
  size = os.path.getsize(path)
  with open(path, "rb") as file:
    if format_name == "mpegts":
      return all(size % packet for packet in _TRANSPORT_PACKETS)
    if format_name == "gif":
      file.seek(max(0, size - 4096))
      return not file.read().rstrip(b"\0").endswith(_GIF_TRAILER)
    if format_name == "asf":
      _, _, properties = file.read(_ASF_HEADER_BYTES).partition(_ASF_FILE_PROPERTIES)
      stated, flags = (int.from_bytes(properties[i - 16 : i - 8], "little") for i in (40, 88))
      return size < stated and not flags & 1
  return False
