"""Contact sheets and clips of frames, and how far a reconstruction is from the truth.

Legend: N frames, H height, W width in pixels.
"""

import math
import os
import pathlib
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

_GAP = 4


def save_contact_sheet(
  path: str | os.PathLike, rows: Sequence[np.ndarray | list[np.ndarray]], scale: int = 2
) -> None:
  """Writes rows of frames as one PNG; each row shows its frames from left to right.

  Args:
    path: the PNG; its folder is created.
    rows: uint8 [N, H, W, 3] per row, with the same H and W; N may differ.
    scale: pixels along each side that show one pixel of a frame.
  """
  height, width = rows[0][0].shape[:2]
  columns = max(len(row) for row in rows)
  sheet = np.full(
    (len(rows) * (height * scale + _GAP) - _GAP, columns * (width * scale + _GAP) - _GAP, 3),
    255,
    np.uint8,
  )
  for i, row in enumerate(rows):
    for j, frame in enumerate(row):
      top = i * (height * scale + _GAP)
      left = j * (width * scale + _GAP)
      enlarged = np.asarray(frame).repeat(scale, 0).repeat(scale, 1)
      sheet[top : top + height * scale, left : left + width * scale] = enlarged
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(sheet).save(path, format="PNG")


def save_clip(
  path: str | os.PathLike, frames_NxHxWx3: np.ndarray, frames_per_second: float
) -> None:
  """Writes uint8 frames as an MP4 that browsers play; H and W are even."""
  with av.open(os.fspath(path), "w") as container:
    rate = Fraction(frames_per_second).limit_denominator(1000)
    stream = container.add_stream("libx264", rate=rate, options={"crf": "12"})
    stream.height, stream.width = frames_NxHxWx3.shape[1:3]
    stream.pix_fmt = "yuv420p"
    for frame_HxWx3 in frames_NxHxWx3:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HxWx3, format="rgb24")))
    container.mux(stream.encode())


def peak_signal_to_noise(truth: np.ndarray, other: np.ndarray) -> float:
  """PSNR in decibels between two uint8 arrays of the same shape; infinite if they are equal."""
  return decibels(np.square(truth.astype(np.float64) - other.astype(np.float64)).mean())


def decibels(mean_squared_error: float) -> float:
  """PSNR of 8-bit pixels with this error; infinite if it is 0."""
  return 10 * math.log10(255**2 / mean_squared_error) if mean_squared_error else math.inf
