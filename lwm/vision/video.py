"""Video files to frames, by PyAV.

Legend: N frames.
"""

import math
import os
from collections.abc import Iterator
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream
from PIL import Image

from lwm.errors import UserError
from lwm.vision.cut_off import check_complete
from lwm.vision.display import to_image

# Time stamps are rounded to the container's time base: ignore less than a millisecond.
_TIME_TOLERANCE = 1e-3
# Time stamps this many seconds behind are those of another film, joined to the first.
_NEW_CLOCK = 1.0
# FFmpeg's assumption too, for a stream that does not state its rate.
_DEFAULT_RATE = 25
# Searching for a place nearer to the beginning is not worth the second start of the decoder.
_SHORTEST_SEEK = 5.0
# FFmpeg draws the characters of text files.
_TEXT_FORMATS = ("tty",)
# FFmpeg's own decoders of these codecs leave out the transparency.
_DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def read_frames(
  path: str | os.PathLike,
  frames_per_second: float | None = None,
  square_pixels: bool = True,
  *,
  start: float = 0.0,
  end: float | None = None,
  threads: int = 0,
) -> Iterator[Image.Image]:
  """Yields the frames of a file's first video stream as RGB images, as a player shows them.

  Frames are yielded while the file is decoded, so memory does not grow with its length. They come
  in the order in which they are shown. `FrameClock` says when that is; `lwm.vision.display` says
  how rotation, transparency and the like are handled.

  Args:
    path: any file that FFmpeg reads; an image is a film of one frame.
    frames_per_second: yields, for each multiple of 1 / frames_per_second seconds after `start`,
      the first frame that is shown then or later; never one frame twice, so a rate above the
      file's own yields every frame. None yields every frame.
    square_pixels: whether to stretch frames whose pixels are not square.
    start: seconds after the first frame where to begin.
    end: seconds after the first frame where to stop, or None for the end of the file.
    threads: of the decoder; 0 lets FFmpeg choose.

  Raises:
    UserError: the file does not exist, has no video, no frame between `start` and `end`, or cannot
      be decoded to `end`.
  """
  if frames_per_second is not None and not 0 < frames_per_second < math.inf:
    raise UserError(f"frames_per_second={frames_per_second} is not a rate: use a positive number.")
  # Frames yielded, and the multiple that the next one is for.
  count = due = 0
  try:
    with av.open(os.fspath(path)) as container:
      streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic  # The cover of a song.
      ]
      if not streams or container.format.name in _TEXT_FORMATS:
        raise UserError(f"{path} has no video stream: name a video file.")
      stream = streams[0]
      decoder = stream.codec_context
      if decoder is None:
        raise UserError(f"{path} has video that FFmpeg cannot decode: convert it to mp4 first.")
      if stream.metadata.get("alpha_mode") == "1" and decoder.name in _DECODERS_WITH_ALPHA:
        codec = _DECODERS_WITH_ALPHA[decoder.name]
        decoder = cast(VideoCodecContext, av.CodecContext.create(codec, "r"))
      # Threads over whole frames too; the order of frames does not change.
      decoder.thread_type = "AUTO"
      decoder.thread_count = threads
      aspect = float(stream.sample_aspect_ratio or 1) if square_pixels else 1.0
      period = 1 / float(stream.guessed_rate or _DEFAULT_RATE)
      clock = FrameClock(period)
      seconds = -period
      for frame in _decode(container, stream, decoder, clock, start):
        seconds = clock.advance(frame.time)
        if seconds < start - _TIME_TOLERANCE:
          continue
        if end is not None and seconds >= end - _TIME_TOLERANCE:
          break
        if frames_per_second is not None:
          periods = (seconds - start + _TIME_TOLERANCE) * frames_per_second
          if periods < due:
            continue
          due = math.floor(periods) + 1
        count += 1
        yield to_image(frame, aspect)
      else:
        check_complete(path, container, stream, seconds + period, end)
  except FileNotFoundError as error:
    raise UserError(f"There is no video file {path}.") from error
  except av.error.FFmpegError as error:
    where = f"after frame {count}" if count else "as a video"
    raise UserError(
      f"{path} cannot be read {where} ({error.strerror}): name a complete video file."
    ) from error
  if not count:
    between = f" between {start} s and {end} s" if start or end is not None else ""
    raise UserError(f"{path} has no frames{between}: name a complete video file.")


def _decode(
  container: InputContainer,
  stream: VideoStream,
  decoder: VideoCodecContext,
  clock: "FrameClock",
  start: float,
) -> Iterator[av.VideoFrame]:
  """Decodes all frames, or, where the file can be searched, those from a little before `start`."""
  packets = container.demux(stream)
  if start >= _SHORTEST_SEEK:
    first = next((frame for packet in packets for frame in decoder.decode(packet)), None)
    if first is not None and first.time is not None and stream.time_base:
      target = first.time + start - _NEW_CLOCK
      container.seek(round(target / stream.time_base), stream=stream)
      decoder.flush_buffers()
      packets = container.demux(stream)
      frame = next((frame for packet in packets for frame in decoder.decode(packet)), None)
      if frame is not None and frame.time is not None and first.time < frame.time <= target:
        clock.advance(first.time)
        yield frame
        for packet in packets:
          yield from decoder.decode(packet)
        return
    # The index of the file is of no use: decode from the beginning.
    container.seek(0)
    decoder.flush_buffers()
    packets = container.demux(stream)
  for packet in packets:
    yield from decoder.decode(packet)


class FrameClock:
  """When frames are shown, in seconds after the first, even where time stamps are wrong.

  Time stamps are trusted while they advance. A frame whose time stamp is missing, repeats, or steps
  back is shown one frame period after the frame before it. Time stamps that lie more than a second
  behind belong to another film that was joined to the first, or have wrapped around: the clock
  continues from the last frame and then follows them.
  """

  def __init__(self, period: float):
    """Starts before the first frame; `period` is the seconds per frame of the film's rate."""
    self._period = period
    self._last = -period
    # What to add to a time stamp; None before the first.
    self._offset: float | None = None

  def advance(self, stamp: float | None) -> float:
    """Returns when the next frame is shown, from its time stamp in seconds; times only grow."""
    expected = self._last + self._period
    time = expected
    if stamp is not None:
      if self._offset is None or expected - (self._offset + stamp) > _NEW_CLOCK:
        self._offset = expected - stamp
      if self._offset + stamp > self._last:
        time = self._offset + stamp
    self._last = time
    return time


def crop_and_resize(image: Image.Image, resolution: int, position: float = 0.5) -> np.ndarray:
  """Scales an image's shorter side to `resolution` and cuts a square out, as LWM does.

  The longer side is rounded down, and the corner of the square to the nearest pixel, like in LWM's
  `_process_frame` (lwm/vision_chat.py). Only the pixels of the square are computed.

  Args:
    image: RGB.
    resolution: pixels along one side of the result.
    position: where the square lies along the longer side: 0 left or top, 0.5 centre, 1 right or
      bottom.

  Returns:
    uint8 [resolution, resolution, 3].
  """
  shorter = min(image.size)
  box = []
  for side in image.size:
    scaled = int(resolution * side / shorter)
    corner = round((scaled - resolution) * position)
    box.append((side * corner / scaled, min(side * (corner + resolution) / scaled, side)))
  (left, right), (top, bottom) = box
  # The filter reaches over the edges of the box, as it does where the whole image is scaled.
  square = image.resize(
    (resolution, resolution), Image.Resampling.BICUBIC, (left, top, right, bottom)
  )
  return np.asarray(square, np.uint8)


def read_clip(
  path: str | os.PathLike, resolution: int, frames_per_second: float | None = None
) -> np.ndarray:
  """All frames of a clip as centred squares; uint8 [N, resolution, resolution, 3].

  See `read_frames` for the arguments and errors.
  """
  return np.stack(
    [crop_and_resize(image, resolution) for image in read_frames(path, frames_per_second)]
  )
