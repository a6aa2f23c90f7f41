"""A raw document of a source. What cannot be read is a record too, and says its problem."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, Protocol

Value = str | dict[str, Any]


class Record(NamedTuple):
  """A raw document, or the problem that it has instead."""

  # Decides the split and the choice among alternatives: the path below the input, and the line.
  key: str
  # Names the record in the report of bad records: the full path, and the line.
  where: str
  # The manifest counts documents by this name.
  source: str
  # A text, or fields by name.
  value: Value | None
  problem: str = ""


class Source(Protocol):
  """Records of one kind, in the same order at each iteration."""

  # The path or the name of the dataset.
  name: str
  # As --source names it. The records of kind `text` are texts, all others have fields.
  kind: str
  # How many files of a folder are not of this kind, or not read for another reason, by that reason.
  left_out: Counter[str]

  def __iter__(self) -> Iterator[Record]: ...


class Problem(NamedTuple):
  """Why a reader cannot give a record; it takes the place of the value."""

  reason: str


# A reader takes an open, decompressed file and gives its records: the number of each in the file,
# from 1 ("" if the file is one record), and its value. It raises any exception for a file that
# cannot be read further.
Reader = Callable[[BinaryIO], Iterator[tuple[str, Value | Problem]]]


def check_encoding(start: bytes) -> None:
  """Raises ValueError if a file begins as no UTF-8 text does, but as UTF-16 or UTF-32 does."""
  encoding = json.detect_encoding(start)
  if not encoding.startswith("utf-8"):
    raise ValueError(f"it looks like {encoding.upper()}, so convert it to UTF-8")


def fields(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """Fields by name. Raises ValueError if a name occurs twice: one value would be lost."""
  pairs = list(pairs)
  value = dict(pairs)
  if len(value) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"field {twice!r} occurs twice")
  return value


def reason(error: Exception) -> str:
  """What a report says of a record or file that raised `error`."""
  if isinstance(error, UnicodeDecodeError):
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}"
  message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  return f"cannot be read: {message.strip().partition('\n')[0] or type(error).__name__}"
