"""Video files to frames, by PyAV.

Legend: N frames, H height, W width in pixels.
"""

import math
import os
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image

from lwm.errors import UserError

# Timestamps are rounded to the container's time base: forgive less than a millisecond.
_TIME_TOLERANCE = 1e-3


def read_frames(
  path: str | os.PathLike, frames_per_second: float | None = None
) -> Iterator[Image.Image]:
  """Yields the frames of a file's first video stream as RGB images, in order of time.

  Args:
    path: any file that FFmpeg reads.
    frames_per_second: yields, for each multiple of 1 / frames_per_second seconds after the first
      frame, the first frame that is shown then or later; never one frame twice, so a higher rate
      than the file's own yields its own. None: every frame.

  Raises:
    UserError: no such file, no video in it, or it cannot be decoded to its end.
  """
  if frames_per_second is not None and frames_per_second <= 0:
    raise UserError(f"frames_per_second={frames_per_second} is not a rate: use a positive number.")
  # Frames yielded, and the multiple that the next one is for.
  count = due = 0
  try:
    with av.open(os.fspath(path)) as container:
      if not container.streams.video:
        raise UserError(f"{path} has no video stream: name a video file.")
      stream = container.streams.video[0]
      # Threads over whole frames too; the order of frames does not change.
      stream.thread_type = "AUTO"
      start = None
      for frame in container.decode(stream):
        if frame.time is None:
          raise UserError(f"{path} has a frame without a time; convert it to mp4 first.")
        start = frame.time if start is None else start
        if frames_per_second is not None:
          periods = (frame.time - start + _TIME_TOLERANCE) * frames_per_second
          if periods < due:
            continue
          due = math.floor(periods) + 1
        count += 1
        yield frame.to_image()
  except FileNotFoundError as error:
    raise UserError(f"There is no video file {path}.") from error
  except av.error.FFmpegError as error:
    where = f"after frame {count}" if count else "as a video"
    raise UserError(
      f"{path} cannot be read {where} ({error.strerror}): name a complete video file."
    ) from error
  if not count:
    raise UserError(f"{path} has no frames: name a complete video file.")


def crop_and_resize(image: Image.Image, resolution: int, position: float = 0.5) -> np.ndarray:
  """The largest square of an image, scaled to `resolution` pixels a side.

  Args:
    image: RGB.
    resolution: pixels.
    position: of the square along the longer side: 0 left or top, 0.5 centre, 1 right or bottom.

  Returns:
    uint8 [resolution, resolution, 3].
  """
  side = min(image.size)
  left = round((image.width - side) * position)
  top = round((image.height - side) * position)
  box = (left, top, left + side, top + side)
  # Not by resize(box=...), whose filter would reach over the edges of the square.
  scaled = image.crop(box).resize((resolution, resolution), Image.Resampling.BICUBIC)
  return np.asarray(scaled, np.uint8)


def read_clip(
  path: str | os.PathLike,
  resolution: int,
  frames_per_second: float | None = None,
  position: float = 0.5,
) -> np.ndarray:
  """All frames of a clip as squares; uint8 [N, resolution, resolution, 3]. See `read_frames`."""
  return np.stack(
    [crop_and_resize(image, resolution, position) for image in read_frames(path, frames_per_second)]
  )
