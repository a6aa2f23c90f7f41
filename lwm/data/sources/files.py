"""Records of a file, or of all files of one kind in a folder and below."""

import collections
import hashlib
import io
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow

from lwm.data.sources import json_files, parquet, text
from lwm.data.sources.record import Problem, Reader, Record, reason
from lwm.errors import UserError


class _Kind(NamedTuple):
  read: Reader
  suffix: str


# The kinds of files, by the name that --source takes.
READERS = {
  "text": _Kind(text.read, ".txt"),
  "jsonl": _Kind(json_files.read_lines, ".jsonl"),
  "json": _Kind(json_files.read_array, ".json"),
  "parquet": _Kind(parquet.read, ".parquet"),
}
# Compressed files are recognised by their first bytes, because names can be wrong. No file of the
# above kinds begins with these bytes.
_COMPRESSIONS = {
  b"\x1f\x8b": "gzip",
  b"\x28\xb5\x2f\xfd": "zstd",
  # zstd that begins with a skippable frame, as parallel compressors write it.
  **{bytes([first, 0x2A, 0x4D, 0x18]): "zstd" for first in range(0x50, 0x60)},
}
_COMPRESSED_SUFFIXES = (".gz", ".zst")


class FileSource:
  """Records of a file, or of all files in a folder and below whose names end in a suffix.

  The case of a suffix does not matter, and .gz or .zst may follow it. Links are followed, but a
  file or folder with several names is read once. Hidden files and folders are left out.

  The first records are those of paths that cannot be read, with the problem. The records of the
  files follow, in the order of their paths.
  """

  def __init__(
    self, path: str | os.PathLike[str], kind: str | None = None, suffix: str | None = None
  ):
    """
    Args:
      path: the file or folder.
      kind: one of READERS; if None, the kind of the file, or the only kind in the folder.
      suffix: of the files to take from a folder; if None, the suffix of the kind.

    Raises:
      UserError: the path does not exist, no file in the folder fits, or the kind must be named.
    """
    self.name = str(path)
    self._root = pathlib.Path(path)
    self.left_out: collections.Counter[str] = collections.Counter()
    self._problems: list[Record] = []
    if not self._root.exists():
      raise UserError(f"There is no input {path}.")
    self._files = self._find() if self._root.is_dir() else [self._root]
    self.kind = kind or self._only_kind()
    if self._root.is_dir():
      self._choose(suffix or READERS[self.kind].suffix)

  def __iter__(self) -> Iterator[Record]:
    yield from self._problems
    for file in self._files:
      name = self._relative(file)
      count = 0
      try:
        with open(file, "rb") as raw:
          for number, value in READERS[self.kind].read(_decompressed(raw)):
            count += 1
            place = f":{number}" if number else ""
            source = name if number else self._root.name
            content, problem = (None, value.reason) if isinstance(value, Problem) else (value, "")
            yield Record(name + place, f"{file}{place}", source, content, problem)
        problem = "" if count else "no record in this file"
      except Exception as error:  # The libraries that read files raise all kinds.
        problem = reason(error) + (f" (after {count} records)" if count else "")
      if problem:
        yield Record(name, str(file), name, None, problem)

  def identity(self) -> str:
    """A hash of the names and sizes of the files."""
    files = [(self._relative(file), file.stat().st_size) for file in self._files]
    return hashlib.sha256(repr(files).encode("utf-8", "surrogateescape")).hexdigest()

  def leave_out(self, held_out: "FileSource") -> None:
    """Leaves the files of --validation_input out, under whatever names this source has them.

    Raises:
      UserError: no file remains.
    """
    identities = {_identity(file.stat()) for file in held_out._files}
    files = [file for file in self._files if _identity(file.stat()) not in identities]
    if not files:
      raise UserError(
        f"--validation_input={held_out.name} holds out every file of --input={self.name}: name "
        "other files."
      )
    count = len(self._files) - len(files)
    self.left_out.update(["held out by --validation_input"] * count)
    self._files = files

  def _find(self) -> list[pathlib.Path]:
    """All files of the folder, in the order of their paths; other paths are counted or reported."""
    files = []
    known = set()
    paths = collections.deque([self._root])
    # Links come last, so that a file with several names is read under its own.
    links: collections.deque[pathlib.Path] = collections.deque()
    while paths or links:
      path = (paths or links).popleft()
      try:
        status = path.stat()
        identity = _identity(status)
        if identity in known:
          self.left_out["further links to one file or folder"] += 1
        elif stat.S_ISREG(status.st_mode):
          files.append(path)
        elif stat.S_ISDIR(status.st_mode):
          for entry in sorted(path.iterdir()):
            if entry.name.startswith("."):
              self.left_out["hidden"] += 1
            else:
              (links if entry.is_symlink() else paths).append(entry)
        else:
          self._report(path, "neither a file nor a folder")
        known.add(identity)
      except OSError as error:
        self._report(path, reason(error))
    return sorted(files)

  def _only_kind(self) -> str:
    kinds = {
      kind
      for file in self._files
      for kind, (_, suffix) in READERS.items()
      if _ends_in(file, suffix)
    }
    if len(kinds) != 1:
      raise UserError(
        f"{self._root} holds {' and '.join(sorted(kinds)) or 'no known kind of'} files: name the "
        f"kind to read by --source={'|'.join(READERS)}."
      )
    return kinds.pop()

  def _choose(self, suffix: str) -> None:
    """Keeps the files that end in `suffix`, and counts the others."""
    self.left_out.update(_suffix(file) for file in self._files if not _ends_in(file, suffix))
    self._files = [file for file in self._files if _ends_in(file, suffix)]
    if not self._files and not self._problems:
      others = ", ".join(f"{name} {count}" for name, count in self.left_out.most_common())
      raise UserError(
        f"There is no file that ends in {suffix} in {self._root}: take another --suffix or "
        f"--source (left out: {others or 'none'})."
      )

  def _relative(self, path: pathlib.Path) -> str:
    return path.name if path == self._root else str(path.relative_to(self._root))

  def _report(self, path: pathlib.Path, problem: str) -> None:
    self._problems.append(Record(self._relative(path), str(path), self._root.name, None, problem))


def _identity(status: os.stat_result) -> tuple[int, int]:
  """The same for all names of one file."""
  return status.st_dev, status.st_ino


def _decompressed(raw: io.BufferedReader) -> io.BufferedReader:
  start = raw.peek(4)
  for magic, name in _COMPRESSIONS.items():
    if start.startswith(magic):
      return io.BufferedReader(pyarrow.input_stream(raw, compression=name), 1 << 16)
  return raw


def _ends_in(path: pathlib.Path, suffix: str) -> bool:
  name = path.name.lower()
  endings = [suffix.lower() + compressed for compressed in ("", *_COMPRESSED_SUFFIXES)]
  return name.endswith(tuple(endings))


def _suffix(path: pathlib.Path) -> str:
  """The suffix to count a file by: `.csv`, or `.csv.gz` if it is compressed."""
  suffixes = [suffix.lower() for suffix in path.suffixes]
  compressed = bool(suffixes) and suffixes[-1] in _COMPRESSED_SUFFIXES
  return "".join(suffixes[-2:] if compressed else suffixes[-1:]) or "without a suffix"
