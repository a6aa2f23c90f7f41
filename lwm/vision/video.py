"""Video files to frames, by PyAV.

Legend: N frames.
"""

import math
import os
from collections.abc import Iterator
from typing import cast

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from PIL import Image

from lwm.errors import UserError
from lwm.vision.display import to_image

# Time stamps are rounded to the container's time base: ignore less than a millisecond.
_TIME_TOLERANCE = 1e-3
# Time stamps this many seconds behind are those of another film, joined to the first.
_NEW_CLOCK = 1.0
# FFmpeg's assumption too, for a stream that does not state its rate.
_DEFAULT_RATE = 25
# FFmpeg's own decoders of these codecs leave out the transparency.
_DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def read_frames(
  path: str | os.PathLike, frames_per_second: float | None = None, square_pixels: bool = True
) -> Iterator[Image.Image]:
  """Yields the frames of a file's first video stream as RGB images, as a player shows them.

  Frames are yielded while the file is decoded, so memory does not grow with its length. They come
  in the order in which they are shown. `FrameClock` says when that is; `lwm.vision.display` says
  how rotation, transparency and the like are handled.

  Args:
    path: any file that FFmpeg reads; an image is a film of one frame.
    frames_per_second: yields, for each multiple of 1 / frames_per_second seconds after the first
      frame, the first frame that is shown then or later; never one frame twice, so a rate above
      the file's own yields every frame. None yields every frame.
    square_pixels: whether to stretch frames whose pixels are not square.

  Raises:
    UserError: the file does not exist, has no video, or cannot be decoded to its end.
  """
  if frames_per_second is not None and not 0 < frames_per_second < math.inf:
    raise UserError(f"frames_per_second={frames_per_second} is not a rate: use a positive number.")
  # Frames yielded, and the multiple that the next one is for.
  count = due = 0
  try:
    with av.open(os.fspath(path)) as container:
      if not container.streams.video:
        raise UserError(f"{path} has no video stream: name a video file.")
      stream = container.streams.video[0]
      decoder = stream.codec_context
      if decoder is None:
        raise UserError(f"{path} has video that FFmpeg cannot decode: convert it to mp4 first.")
      if stream.metadata.get("alpha_mode") == "1" and decoder.name in _DECODERS_WITH_ALPHA:
        codec = _DECODERS_WITH_ALPHA[decoder.name]
        decoder = cast(VideoCodecContext, av.CodecContext.create(codec, "r"))
      # Threads over whole frames too; the order of frames does not change.
      decoder.thread_type = "AUTO"
      aspect = float(stream.sample_aspect_ratio or 1) if square_pixels else 1.0
      clock = FrameClock(1 / float(stream.guessed_rate or _DEFAULT_RATE))
      for packet in container.demux(stream):
        for frame in decoder.decode(packet):
          seconds = clock.advance(frame.time)
          if frames_per_second is not None:
            periods = (seconds + _TIME_TOLERANCE) * frames_per_second
            if periods < due:
              continue
            due = math.floor(periods) + 1
          count += 1
          yield to_image(frame, aspect)
  except FileNotFoundError as error:
    raise UserError(f"There is no video file {path}.") from error
  except av.error.FFmpegError as error:
    where = f"after frame {count}" if count else "as a video"
    raise UserError(
      f"{path} cannot be read {where} ({error.strerror}): name a complete video file."
    ) from error
  if not count:
    raise UserError(f"{path} has no frames: name a complete video file.")


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
  """Cuts the largest square out of an image and scales it.

  Args:
    image: RGB.
    resolution: pixels along one side of the result.
    position: where the square lies along the longer side: 0 left or top, 0.5 centre, 1 right or
      bottom.

  Returns:
    uint8 [resolution, resolution, 3].
  """
  side = min(image.size)
  left = round((image.width - side) * position)
  top = round((image.height - side) * position)
  box = (left, top, left + side, top + side)
  # resize(box=...) would let the filter reach over the edges of the square.
  scaled = image.crop(box).resize((resolution, resolution), Image.Resampling.BICUBIC)
  return np.asarray(scaled, np.uint8)


def read_clip(
  path: str | os.PathLike, resolution: int, frames_per_second: float | None = None
) -> np.ndarray:
  """All frames of a clip as centred squares; uint8 [N, resolution, resolution, 3].

  See `read_frames` for the arguments and errors.
  """
  return np.stack(
    [crop_and_resize(image, resolution) for image in read_frames(path, frames_per_second)]
  )
