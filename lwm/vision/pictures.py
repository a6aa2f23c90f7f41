"""Pictures for people: contact sheets of frames, and how far a reconstruction is from the truth.

Legend: N frames, H height, W width in pixels.
"""

import math
import os
import pathlib

import numpy as np
from PIL import Image

_GAP = 4


def save_contact_sheet(
  path: str | os.PathLike, rows: list[list[np.ndarray]] | list[np.ndarray], scale: int = 2
) -> None:
  """Writes frames as one PNG: one row for each entry, frames of a row from left to right.

  Args:
    path: of the PNG; its folder is made.
    rows: each uint8 [N, H, W, 3] of the same H and W; N may differ.
    scale: whole pixels shown for each pixel.
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


def peak_signal_to_noise(truth: np.ndarray, other: np.ndarray) -> float:
  """PSNR in decibels of two uint8 arrays of the same shape; infinite if they are equal."""
  error = np.square(truth.astype(np.float64) - other.astype(np.float64)).mean()
  return math.inf if error == 0.0 else 10.0 * math.log10(255.0**2 / error)
