"""Writing a prepared dataset: all at once, or in parts that can be made by several processes.

See lwm/data/dataset.py for the format.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import types
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

from lwm.config.vqgan import LWM_LAYOUT, VisionLayout
from lwm.data.dataset import TRAIN
from lwm.data.documents import Document
from lwm.data.parts import CHUNK_TOKENS, MANIFEST, PartWriter, Vocabulary, first_problem, join_parts
from lwm.data.tokenizer import Tokenizer
from lwm.errors import UserError

_RECORDS_PER_FILE = 16384
# Documents per part, at most, so that each part has numbers of its own.
_NUMBERS_PER_PART = 1 << 32
_SETTINGS = "settings.json"
_JOINED = "joined"


class DatasetWriter:
  """Writes documents. The dataset appears at `path` only once everything is written.

      with DatasetWriter(path, tokenizer) as writer:
        writer.write("train", text_document(tokenizer, text), source="book.txt")

  An error inside the `with` leaves nothing at `path`. An existing dataset is never touched.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    vqgan_sha256: str | None = None,
    layout: VisionLayout = LWM_LAYOUT,
    chunk_tokens: int = CHUNK_TOKENS,
  ):
    """
    Args:
      path: directory to make; its parents are made too.
      tokenizer: encoded the text of the documents.
      vqgan_sha256: of the file of the VQGAN that the vision codes come from, if known.
      layout: of that VQGAN. It means nothing if no document holds vision tokens.
      chunk_tokens: tokens per record, at most.

    Raises:
      UserError: `path` exists already.
    """
    self.path = pathlib.Path(path)
    _refuse_existing(self.path)
    self._unfinished = self.path.with_name(f".{self.path.name}.unfinished-{os.getpid()}")
    self._vocabulary = Vocabulary(tokenizer, vqgan_sha256, layout, chunk_tokens)
    self._documents: dict[str, int] = {}
    self._parts: list[pathlib.Path] = []
    self.bad_records = 0

  def __enter__(self) -> Self:
    self.path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(self._unfinished, ignore_errors=True)
    self._unfinished.mkdir()
    self._part = self._new_part()
    return self

  def __exit__(
    self,
    error_type: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    try:
      if error_type is None:
        self._part.close()
        joined = self._unfinished / _JOINED
        _join(self.path, self._parts, joined, self._vocabulary, {})
        joined.rename(self.path)
    finally:
      shutil.rmtree(self._unfinished)

  def write(self, split: str, document: Document, source: str = "") -> None:
    """Appends a document to a split. The manifest counts the documents of each `source`.

    Raises:
      BadDocument: no token counts in the loss as a target, or an id is out of range.
    """
    if self._part.num_records >= _RECORDS_PER_FILE:
      self._part.close()
      self._part = self._new_part()
    self._part.write(split, document, source)
    self._documents[split] = self._documents.get(split, 0) + 1

  @property
  def splits(self) -> list[str]:
    """The names of the splits that have documents."""
    return list(self._documents)

  def bad(self, where: str, reason: str) -> None:
    """Reports a record that was skipped; `where` is file:line, or what names the record best."""
    self.bad_records += 1
    self._part.bad(where, reason)

  def _new_part(self) -> PartWriter:
    first = dict(self._documents)
    self._parts.append(self._unfinished / str(len(self._parts)))
    return PartWriter(self._parts[-1], self._vocabulary, lambda split: first.get(split, 0))


class Closable(Protocol):
  """What writes one part."""

  def close(self) -> None: ...


class Parts[Writer: Closable]:
  """A dataset that is made in numbered parts, by one or more processes, in any order.

  Complete parts are kept in a directory beside `path`, so a process that was killed makes only its
  unfinished parts again. The dataset depends on the parts alone, not on who made them or when.
  Nothing is locked: if two processes make the same part, the first to complete it wins.

  Attributes:
    path: of the dataset.
    directory: of the parts and other files of the work; it is removed at the end.
  """

  def __init__(self, path: str | os.PathLike, settings: Mapping[str, Any]):
    """
    Args:
      path: of the dataset; its parents are made.
      settings: everything that decides what the parts hold, as JSON values by name.

    Raises:
      UserError: `path` exists already, or was begun with other settings.
    """
    self.path = pathlib.Path(path)
    _refuse_existing(self.path)
    self.directory = self.path.with_name(f".{self.path.name}.unfinished")
    self._joined = self.directory / _JOINED
    self.directory.mkdir(parents=True, exist_ok=True)
    self._check_settings(dict(settings))

  def _open_part(self, directory: pathlib.Path, number: int) -> Writer:
    """A writer of a part, which makes the directory."""
    raise NotImplementedError

  def _join_parts(self, parts: list[pathlib.Path], joined: pathlib.Path) -> list[str]:
    """Makes a dataset at `joined`, which may exist, and returns the names of its splits.

    The manifest comes last. Raises UserError if there is nothing to write.
    """
    raise NotImplementedError

  def is_complete(self, number: int) -> bool:
    """Whether a part is complete."""
    return self._part(number).exists() or (self._joined / MANIFEST).exists()

  @contextlib.contextmanager
  def part(self, number: int) -> Iterator[Writer]:
    """Writes a part, which is complete at the end of the `with` unless an error ends it."""
    own = f"-{socket.gethostname()}-{os.getpid()}"
    directory = self.directory / (self._part(number).name + own)
    # Left by a process of the same number that was killed.
    shutil.rmtree(directory, ignore_errors=True)
    writer = self._open_part(directory, number)
    yield writer
    writer.close()
    try:
      directory.rename(self._part(number))
    except OSError:
      if not self._part(number).exists():
        raise
      shutil.rmtree(directory)  # Another process was faster.

  def join(self, count: int) -> None:
    """Makes the dataset of the parts [0, count), which are complete.

    Raises:
      UserError: there is nothing to train on. All parts are removed then.
    """
    parts = [self._part(number) for number in range(count)]
    if not (self._joined / MANIFEST).exists():
      try:
        splits = self._join_parts(parts, self._joined)
        if TRAIN not in splits:
          raise UserError(f"{self.path} would hold out every document: hold out fewer.")
      except UserError:
        shutil.rmtree(self.directory)
        raise
    # The parts have lost their files, so they must not outlive `joined`.
    for leftover in self.directory.iterdir():
      if leftover.is_dir() and leftover != self._joined:
        shutil.rmtree(leftover)
    self._joined.rename(self.path)
    shutil.rmtree(self.directory)

  def _part(self, number: int) -> pathlib.Path:
    return self.directory / f"part-{number:06d}"

  def _check_settings(self, settings: dict[str, Any]) -> None:
    file = self.directory / _SETTINGS
    if not file.exists():
      new = file.with_name(f"{_SETTINGS}-{socket.gethostname()}-{os.getpid()}")
      new.write_text(json.dumps(settings, indent=2) + "\n")
      new.rename(file)
    begun = json.loads(file.read_text())
    for name in settings.keys() | begun.keys():
      if begun.get(name) != settings.get(name):
        raise UserError(
          f"{self.path} was begun with {name}={begun.get(name)}, and now it is "
          f"{settings.get(name)}: use the same input and flags, or delete {self.directory}."
        )


class DatasetParts(Parts[PartWriter]):
  """A dataset of documents that is made in numbered parts."""

  def __init__(self, path: str | os.PathLike, vocabulary: Vocabulary, settings: Mapping[str, Any]):
    """
    Args:
      path: of the dataset; its parents are made.
      vocabulary: of the documents.
      settings: everything else that decides what the parts hold, as JSON values by name.

    Raises:
      UserError: `path` exists already, or was begun with other settings.
    """
    self._vocabulary, self._settings = vocabulary, settings
    super().__init__(
      path,
      {
        "tokenizer": vocabulary.tokenizer.sha256,
        "vqgan": vocabulary.vqgan_sha256,
        "chunk_tokens": vocabulary.chunk_tokens,
        **settings,
      },
    )

  def _open_part(self, directory: pathlib.Path, number: int) -> PartWriter:
    return PartWriter(directory, self._vocabulary, lambda split: number * _NUMBERS_PER_PART)

  def _join_parts(self, parts: list[pathlib.Path], joined: pathlib.Path) -> list[str]:
    return _join(self.path, parts, joined, self._vocabulary, self._settings)


def _refuse_existing(path: pathlib.Path) -> None:
  if path.exists():
    raise UserError(f"{path} exists already: delete it, or name another output.")


def _join(
  path: pathlib.Path,
  parts: list[pathlib.Path],
  joined: pathlib.Path,
  vocabulary: Vocabulary,
  settings: Mapping[str, Any],
) -> list[str]:
  """Joins the parts, and returns the names of the splits."""
  manifest = join_parts(parts, joined, vocabulary, settings)
  if manifest["splits"]:
    return list(manifest["splits"])
  if not manifest["bad_records"]:
    raise UserError(f"Nothing to write to {path}: there is no document.")
  raise UserError(
    f"No good document in the input, {manifest['bad_records']} bad ones; the first: "
    f"{first_problem(parts)}."
  )
