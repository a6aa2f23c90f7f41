"""What sources and readers give: records. Input that cannot be read is a record with a problem."""

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
  # The name of the kind for --source. Records of the kind `text` are texts; all others have fields.
  kind: str
  # The numbers of files in a folder that are not read, by suffix or other reason.
  left_out: Counter[str]

  def identity(self) -> str:
    """Changes when the records change, as far as that shows without reading them."""

  def __iter__(self) -> Iterator[Record]: ...


class Problem(NamedTuple):
  """Why a reader cannot give a record or one of its fields; it takes the place of the value."""

  reason: str


# A reader takes a file, open and decompressed, and gives each record's number in the file (from 1,
# or "" if the whole file is one record) and its value. It gives a Problem for one bad record, and
# raises any exception if it cannot read on.
Reader = Callable[[BinaryIO], Iterator[tuple[str, Value | Problem]]]


def check_encoding(start: bytes) -> None:
  """Raises ValueError if the first bytes of a file show that it is UTF-16 or UTF-32."""
  encoding = json.detect_encoding(start)
  first = start[:8].decode(encoding, errors="ignore")
  # A binary file may begin with zero bytes as well, but rarely reads as printable characters.
  if not encoding.startswith("utf-8") and "".join(first.split()).isprintable():
    raise ValueError(f"it looks like {encoding.upper()}, so convert it to UTF-8")


def fields(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """Fields by name. Raises ValueError if a name occurs twice, because one value would be lost."""
  pairs = list(pairs)
  value = dict(pairs)
  if len(value) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"field {twice!r} occurs twice")
  return value


def reason(error: Exception) -> str:
  """The reason, for the report, why a record or file that raised `error` is bad."""
  if isinstance(error, UnicodeDecodeError):
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}"
  message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  return f"cannot be read: {message.strip().partition('\n')[0] or type(error).__name__}"
