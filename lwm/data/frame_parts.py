"""Writing a dataset of frames, in parts that can be made by several processes.

See lwm/data/frames.py for the format, and lwm/data/writer.py for what parts are.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from lwm.data.frames import FORMAT_VERSION, MANIFEST
from lwm.data.parts import BAD_RECORDS, first_problem
from lwm.data.writer import Parts
from lwm.errors import UserError

_SUMMARY = "part.json"


class FramePartWriter:
  """Writes the frames of one part."""

  def __init__(self, directory: pathlib.Path):
    """Makes the directory."""
    directory.mkdir()
    self._directory = directory
    self._files: dict[str, ArrayRecordWriter] = {}
    self._frames: dict[str, int] = {}
    self._bad_records = 0
    (directory / BAD_RECORDS).touch()

  def write(self, split: str, frame_HxWx3: np.ndarray) -> None:
    """Appends a frame, uint8, to a split."""
    if split not in self._files:
      path = str(self._directory / _records_file(split))
      # Frames are read in any order, so each is compressed on its own.
      self._files[split] = ArrayRecordWriter(path, "group_size:1,zstd:1")
      self._frames[split] = 0
    self._files[split].write(frame_HxWx3.tobytes())
    self._frames[split] += 1

  def bad(self, where: str, reason: str) -> None:
    """Reports a film that was skipped."""
    self._bad_records += 1
    with open(self._directory / BAD_RECORDS, "a") as file:
      file.write(json.dumps({"where": where, "reason": reason}) + "\n")

  def close(self) -> None:
    """Completes the files."""
    for file in self._files.values():
      file.close()
    summary = {"frames": self._frames, "bad_records": self._bad_records}
    (self._directory / _SUMMARY).write_text(json.dumps(summary))


class FrameParts(Parts[FramePartWriter]):
  """A dataset of frames that is made in numbered parts."""

  def __init__(self, path: str | os.PathLike, resolution: int, settings: Mapping[str, Any]):
    """
    Args:
      path: of the dataset; its parents are made.
      resolution: pixels along one side of a frame.
      settings: everything else that decides what the parts hold, as JSON values by name.

    Raises:
      UserError: `path` exists already, or was begun with other settings.
    """
    self._resolution = resolution
    super().__init__(path, {"resolution": resolution, **settings})

  def _open_part(self, directory: pathlib.Path, number: int) -> FramePartWriter:
    return FramePartWriter(directory)

  def _join_parts(self, parts: list[pathlib.Path], joined: pathlib.Path) -> list[str]:
    joined.mkdir(exist_ok=True)
    splits: dict[str, dict[str, int]] = {}
    bad_records = 0
    for part in parts:
      summary = json.loads((part / _SUMMARY).read_text())
      bad_records += summary["bad_records"]
      for split, frames in summary["frames"].items():
        files = splits.setdefault(split, {})
        name = f"{_records_file(split)}-{len(files):05d}"
        files[name] = frames
        source = part / _records_file(split)
        if source.exists():  # A join that was killed has moved it.
          source.rename(joined / name)
    if not splits:
      problem = f"; the first bad one: {first_problem(parts)}" if bad_records else ""
      raise UserError(f"Nothing to write to {self.path}: there is no frame{problem}.")
    with open(joined / BAD_RECORDS, "wb") as file:
      for part in parts:
        file.write((part / BAD_RECORDS).read_bytes())
    manifest = {
      "frames_version": FORMAT_VERSION,
      "resolution": self._resolution,
      "bad_records": bad_records,
      "splits": splits,
    }
    unfinished = joined / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(manifest, indent=2) + "\n")
    unfinished.rename(joined / MANIFEST)
    return list(splits)


def _records_file(split: str) -> str:
  return f"frames-{split}.array_record"
