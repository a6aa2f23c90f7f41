"""A dataset of frames, which VQGANs train on: uint8 pixels in ArrayRecord files, and a manifest.

The directory has

  frames-SPLIT.array_record-*   one frame per record: H x W x 3 bytes, row by row, which ArrayRecord
                                compresses without loss. A frame of 256x256 pixels is 197 KB, of
                                which films take about 90 KB on disk; reading takes 0.5 ms, a sixth
                                of a PNG's time
  manifest.json                 resolution (pixels along one side), the files of each split with
                                their numbers of frames, and the number of bad films
  bad_records.jsonl             the films that were skipped: where, and why

H and W are height and width in pixels.
"""

import functools
import json
import os
import pathlib
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from lwm.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_FIX = "restore the file from a copy, or prepare the dataset again"


class FrameDataset:
  """A dataset of frames on disk. Reading is safe from any number of threads.

  Attributes:
    path: its directory.
    manifest: see above.
    resolution: pixels along one side of a frame.
  """

  def __init__(self, path: str | os.PathLike):
    """Raises UserError if `path` is not a complete dataset of frames."""
    self.path = pathlib.Path(path)
    try:
      self.manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
      raise UserError(
        f"There is no dataset of frames at {path} (no {MANIFEST}): make one with "
        "`python -m experiments.prepare_frames`."
      ) from None
    except json.JSONDecodeError as error:
      raise UserError(f"{path}/{MANIFEST} is damaged ({error}): {_FIX}.") from None
    if self.manifest.get("frames_version") != FORMAT_VERSION:
      raise UserError(
        f"{path} is not a dataset of frames that this program reads: make one with "
        "`python -m experiments.prepare_frames`."
      )
    self.resolution: int = self.manifest["resolution"]

  def has_split(self, split: str) -> bool:
    return split in self.manifest["splits"]

  def num_frames(self, split: str) -> int:
    """Number of frames of a split, 0 if the dataset does not have it."""
    return sum(self.manifest["splits"].get(split, {}).values())

  def read(self, split: str, index: int) -> np.ndarray:
    """A frame, uint8 [H, W, 3]; read-only.

    Raises:
      UserError: its record is damaged, or its file is missing.
    """
    try:
      content = self._source(split)[index]
      return np.frombuffer(content, np.uint8).reshape(self.resolution, self.resolution, 3)
    except Exception as error:  # ArrayRecord raises all kinds, and none names the record.
      reason = str(error).partition("\n")[0]
      for file, frames in self.manifest["splits"][split].items():
        if index < frames:
          break
        index -= frames
      raise UserError(
        f"Record {index} of {self.path / file} cannot be read ({reason}): {_FIX}; then run the "
        "same command again to resume from the last checkpoint."
      ) from error

  @functools.cache  # noqa: B019  # a dataset lives as long as its run
  def _source(self, split: str) -> ArrayRecordDataSource:
    return ArrayRecordDataSource([str(self.path / file) for file in self.manifest["splits"][split]])
