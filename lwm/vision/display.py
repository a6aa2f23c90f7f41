"""A decoded film frame as the RGB image that a player shows."""

import av
import numpy as np
from av.video.reformatter import ColorRange
from PIL import Image

# Grey levels of "limited range" video, where 16 is black and 235 is white, as full-range levels.
_FROM_LIMITED_RANGE = [min(max(round((level - 16) * 255 / 219), 0), 255) for level in range(256)]


def to_image(frame: av.VideoFrame, pixel_aspect: float) -> Image.Image:
  """Converts a frame of any pixel format to RGB and undoes how it was stored.

  Transparent pixels are composited on white, as web pages show them. Frames of pixels that are not
  square are stretched along one side, never shrunk. The display matrix (a telephone's rotation, a
  mirrored camera, an image's EXIF orientation) is applied, rounded to quarter turns. Interlaced
  frames keep both of their fields; HDR colours are not tone-mapped.

  Args:
    frame: decoded by PyAV.
    pixel_aspect: width / height of one stored pixel.
  """
  image = _to_rgb(frame)
  if pixel_aspect > 1:
    image = _resize(image, round(image.width * pixel_aspect), image.height)
  else:
    image = _resize(image, image.width, round(image.height / pixel_aspect))
  matrix = frame.side_data.get("DISPLAYMATRIX")
  return image if matrix is None else _turn(image, np.frombuffer(matrix, np.int32).tolist())


def _to_rgb(frame: av.VideoFrame) -> Image.Image:
  # One thread: FFmpeg keeps the others for as long as the process lives.
  components = frame.format.components
  # The palette of an indexed format may have transparent entries.
  if frame.format.has_palette or any(component.is_alpha for component in components):
    layer = Image.fromarray(frame.to_ndarray(format="rgba", threads=1))
    image = Image.new("RGBA", layer.size, "white")
    image.alpha_composite(layer)
    return image.convert("RGB")
  image = frame.to_image(threads=1)
  # FFmpeg converts the range of colour formats, but takes every grey format for full-range.
  if len(components) == 1 and frame.color_range == ColorRange.MPEG:
    image = image.point(_FROM_LIMITED_RANGE * 3)
  return image


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
  if (width, height) == image.size:
    return image
  return image.resize((width, height), Image.Resampling.BICUBIC)


def _turn(image: Image.Image, matrix: list[int]) -> Image.Image:
  """Applies a display matrix (libavutil/display.h): (x, y) is shown at (a x + c y, b x + d y)."""
  a, b, _, c, d, *_ = matrix
  to_right, to_bottom = a, d
  if abs(b) + abs(c) > abs(a) + abs(d):
    image = image.transpose(Image.Transpose.TRANSPOSE)
    to_right, to_bottom = c, b
  if to_right < 0:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if to_bottom < 0:
    image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
  return image
