"""Files of arrays in flax's msgpack, read and written piece by piece.

There are two layouts. A stream is a row of records (key tuple, bytes), where the bytes are what
`flax.serialization.to_bytes` makes of one array; LWM's checkpoints are streams. A tree is what
`to_bytes` makes of nested dictionaries. Both are indexed here in one pass that reads headers and
skips contents, so no buffer grows with an array, whatever its size.

msgpack: https://github.com/msgpack/msgpack/blob/master/spec.md; flax: `flax/serialization.py`.
"""

import enum
import math
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from lwm.errors import UserError, disk_error

Keys = tuple[str, ...]

# flax's extension type for arrays: msgpack of (shape, name of the dtype, bytes).
_ARRAY_EXTENSION = 1
# flax splits larger arrays into chunks; this mark stands in the dictionary of the chunks.
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK_BYTES = 2**30
_DTYPES = {
  name: np.dtype(getattr(jnp, name)) for name in ("float16", "bfloat16", "float32", "float64")
}
# Nested dictionaries of parameters have about seven levels, of at most a few hundred keys each.
_MOST_LEVELS = 32
_MOST_KEYS = 100_000


class _Kind(enum.Enum):
  """Kinds of msgpack values in these files."""

  INTEGER = enum.auto()
  BOOLEAN = enum.auto()
  TEXT = enum.auto()
  BYTES = enum.auto()
  EXTENSION = enum.auto()
  ARRAY = enum.auto()
  MAP = enum.auto()


# First byte of a value: its kind, and how many bytes of its length, or number, follow.
_SIZED = {
  0xC4: (_Kind.BYTES, 1),
  0xC5: (_Kind.BYTES, 2),
  0xC6: (_Kind.BYTES, 4),
  0xC7: (_Kind.EXTENSION, 1),
  0xC8: (_Kind.EXTENSION, 2),
  0xC9: (_Kind.EXTENSION, 4),
  0xCC: (_Kind.INTEGER, 1),
  0xCD: (_Kind.INTEGER, 2),
  0xCE: (_Kind.INTEGER, 4),
  0xCF: (_Kind.INTEGER, 8),
  0xD9: (_Kind.TEXT, 1),
  0xDC: (_Kind.ARRAY, 2),
  0xDD: (_Kind.ARRAY, 4),
  0xDE: (_Kind.MAP, 2),
  0xDF: (_Kind.MAP, 4),
}


class StoredArray(NamedTuple):
  """Where an array lies in its file."""

  shape: tuple[int, ...]
  dtype: np.dtype
  # (offset, number of bytes) of the pieces of the array, in C order.
  pieces: tuple[tuple[int, int], ...]


class _Malformed(Exception):
  """The file is not what it should be; the message is the reason, without the file's name."""


def index_stream(path: pathlib.Path, prefixes: tuple[Keys, ...] = ((),)) -> dict[Keys, StoredArray]:
  """Where the arrays of a stream lie, by their keys.

  Args:
    path: the file.
    prefixes: records whose keys begin with none of these are skipped, whatever they hold.

  Raises:
    UserError: the file is damaged, or something other than an array has such a key.
  """

  def records(scanner: "_Scanner") -> Iterator[tuple[Keys, StoredArray]]:
    while scanner.position < scanner.size:
      scanner.expect(_Kind.ARRAY, 2)
      keys = tuple(scanner.text() for _ in range(scanner.count(_Kind.ARRAY)))
      stop = scanner.count(_Kind.BYTES) + scanner.position
      if any(keys[: len(prefix)] == prefix for prefix in prefixes):
        yield from scanner.tree(keys)
        if scanner.position != stop:
          raise _Malformed(f"{'/'.join(keys)} has another length than its record says")
      scanner.skip_to(stop)

  return _index(path, records)


def index_tree(path: pathlib.Path) -> dict[Keys, StoredArray]:
  """Where the arrays of nested dictionaries lie, by their keys.

  Raises:
    UserError: the file is damaged, or holds something other than dictionaries and arrays.
  """

  def leaves(scanner: "_Scanner") -> Iterator[tuple[Keys, StoredArray]]:
    yield from scanner.tree(())
    if scanner.position != scanner.size:
      raise _Malformed("something follows its dictionaries")

  return _index(path, leaves)


def _index(path, scan) -> dict[Keys, StoredArray]:
  arrays: dict[Keys, StoredArray] = {}
  last = "the beginning"
  try:
    with open(path, "rb") as file:
      for keys, stored in scan(_Scanner(file)):
        last = "/".join(keys)
        if keys in arrays:
          raise _Malformed(f"it holds {last} twice")
        arrays[keys] = stored
  except OSError as error:
    raise UserError(f"{path} cannot be read: {disk_error(error)}.") from error
  except (_Malformed, UnicodeDecodeError) as error:
    reason = str(error) if isinstance(error, _Malformed) else "a key is not text"
    raise UserError(
      f"{path} is not a complete file of flax's msgpack: after {last}, {reason}; copy or download "
      "it again."
    ) from error
  return arrays


class _Scanner:
  """Reads headers from a file and skips contents."""

  def __init__(self, file: BinaryIO):
    self._file = file
    self.size = os.fstat(file.fileno()).st_size

  @property
  def position(self) -> int:
    return self._file.tell()

  def skip_to(self, offset: int) -> None:
    if offset > self.size:
      raise _Malformed("it ends too early")
    self._file.seek(offset)

  def _bytes(self, count: int) -> bytes:
    content = self._file.read(count)
    if len(content) < count:
      raise _Malformed("it ends too early")
    return content

  def _header(self) -> tuple[_Kind, int]:
    """The kind of the next value and its length; an integer's or a boolean's value."""
    first = self._bytes(1)[0]
    if first < 0x80:
      return _Kind.INTEGER, first
    if first < 0x90:
      return _Kind.MAP, first & 0x0F
    if first < 0xA0:
      return _Kind.ARRAY, first & 0x0F
    if first < 0xC0:
      return _Kind.TEXT, first & 0x1F
    if first in (0xC2, 0xC3):
      return _Kind.BOOLEAN, first & 1
    if 0xD4 <= first <= 0xD8:
      return _Kind.EXTENSION, 1 << (first - 0xD4)
    if first not in _SIZED:
      raise _Malformed("there is a value that is neither a dictionary nor an array")
    kind, width = _SIZED[first]
    return kind, int.from_bytes(self._bytes(width))

  def count(self, kind: _Kind) -> int:
    """The length, or the number, of the next value, which must be of this kind."""
    actual, count = self._header()
    if actual is not kind or (kind in (_Kind.ARRAY, _Kind.MAP, _Kind.TEXT) and count > _MOST_KEYS):
      raise _Malformed("there is something other than keys and arrays")
    return count

  def text(self) -> str:
    return self._bytes(self.count(_Kind.TEXT)).decode("utf-8")

  def expect(self, kind: _Kind, value: int | str) -> None:
    """Raises _Malformed unless this is the next value's length, number or text."""
    if (self.text() if kind is _Kind.TEXT else self.count(kind)) != value:
      raise _Malformed("there is something other than keys and arrays")

  def tree(self, keys: Keys) -> Iterator[tuple[Keys, StoredArray]]:
    """The arrays in the next value, which is an array or a dictionary and has these keys."""
    kind, count = self._header()
    if kind is _Kind.EXTENSION:
      yield keys, self._array(keys, count)
      return
    if kind is not _Kind.MAP or len(keys) > _MOST_LEVELS or count > _MOST_KEYS:
      raise _Malformed(f"{'/'.join(keys)} is neither a dictionary nor an array")
    for number in range(count):
      key = self.text()
      if number == 0 and key == _CHUNKED:
        yield keys, self._chunks(keys)
        return
      yield from self.tree((*keys, key))

  def _array(self, keys: Keys, size: int) -> StoredArray:
    name = "/".join(keys)
    if self._bytes(1)[0] != _ARRAY_EXTENSION:
      raise _Malformed(f"{name} is not an array")
    stop = self.position + size
    self.expect(_Kind.ARRAY, 3)
    shape = tuple(self.count(_Kind.INTEGER) for _ in range(self.count(_Kind.ARRAY)))
    dtype = self.text()
    piece = self.count(_Kind.BYTES), self.position
    count, offset = piece
    if dtype not in _DTYPES:
      raise _Malformed(f"{name} is {dtype[:100]!r}, not one of {', '.join(_DTYPES)}")
    if math.prod(shape) * _DTYPES[dtype].itemsize != count or offset + count != stop:
      raise _Malformed(f"the content of {name} does not fit its shape {shape}")
    if stop > self.size:
      raise _Malformed(f"it ends in the middle of {name}")
    self.skip_to(stop)
    return StoredArray(shape, _DTYPES[dtype], ((offset, count),))

  def _chunks(self, keys: Keys) -> StoredArray:
    """An array that flax has split; its dictionary's first key has been read."""
    self.expect(_Kind.BOOLEAN, True)
    self.expect(_Kind.TEXT, "shape")
    shape = []
    for axis in range(self.count(_Kind.MAP)):
      self.expect(_Kind.TEXT, str(axis))
      shape.append(self.count(_Kind.INTEGER))
    self.expect(_Kind.TEXT, "chunks")
    chunks = []
    for number in range(self.count(_Kind.MAP)):
      self.expect(_Kind.TEXT, str(number))
      chunks.append(self._array((*keys, f"chunk {number}"), self.count(_Kind.EXTENSION)))
    sizes = [math.prod(chunk.shape) for chunk in chunks]
    if len({chunk.dtype for chunk in chunks}) != 1 or math.prod(shape) != sum(sizes):
      raise _Malformed(f"the chunks of {'/'.join(keys)} do not fit its shape {tuple(shape)}")
    pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
    return StoredArray(tuple(shape), chunks[0].dtype, pieces)


def read_array(path: pathlib.Path, stored: StoredArray) -> np.ndarray:
  """Reads one array of a file that was indexed. Raises UserError if the file cannot be read."""
  array = np.empty(stored.shape, stored.dtype)
  missing = memoryview(array.reshape(-1).view(np.uint8))
  try:
    with open(path, "rb", buffering=0) as file:
      for offset, size in stored.pieces:
        file.seek(offset)
        while size:
          count = file.readinto(missing[:size])  # Linux reads at most 2 GiB at a time.
          if not count:
            raise UserError(f"{path} has become shorter while it was read: import it again.")
          missing, size = missing[count:], size - count
  except OSError as error:
    raise UserError(f"{path} cannot be read: {disk_error(error)}.") from error
  return array


def fits_record(shape: tuple[int, ...], dtype: np.dtype) -> bool:
  """Whether an array can be written to a stream: the bytes of a record are less than 4 GiB."""
  return sum(len(header) + count for header, count in _layout(shape, dtype)) < 2**32


def write_record(file: BinaryIO, keys: Keys, array: np.ndarray) -> None:
  """Adds a record to a stream; the array must fit one."""
  content = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  pieces = _layout(array.shape, array.dtype)
  size = sum(len(header) + count for header, count in pieces)
  file.write(b"\x92" + _sized(0xDC, 2, len(keys)))
  file.write(b"".join(_text(key) for key in keys) + _sized(0xC6, 4, size))
  for header, count in pieces:
    file.write(header)
    file.write(content[:count])
    content = content[count:]


def _layout(shape: tuple[int, ...], dtype: np.dtype) -> list[tuple[bytes, int]]:
  """The pieces of an array as flax writes it: the bytes before each, and its size."""
  size = math.prod(shape) * dtype.itemsize
  if size <= _CHUNK_BYTES:
    return [(_array_header(shape, dtype), size)]
  sizes = [min(_CHUNK_BYTES, size - start) for start in range(0, size, _CHUNK_BYTES)]
  header = _sized(0xDE, 2, 3) + _text(_CHUNKED) + b"\xc3" + _text("shape")
  header += _sized(0xDE, 2, len(shape))
  header += b"".join(_text(str(axis)) + _sized(0xCF, 8, side) for axis, side in enumerate(shape))
  header += _text("chunks") + _sized(0xDE, 2, len(sizes))
  pieces = []
  for number, count in enumerate(sizes):
    header += _text(str(number)) + _array_header((count // dtype.itemsize,), dtype)
    pieces.append((header, count))
    header = b""
  return pieces


def _array_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
  sides = b"".join(_sized(0xCF, 8, side) for side in shape)
  count = math.prod(shape) * dtype.itemsize
  inner = b"\x93" + _sized(0xDC, 2, len(shape)) + sides + _text(dtype.name) + _sized(0xC6, 4, count)
  return _sized(0xC9, 4, len(inner) + count) + bytes([_ARRAY_EXTENSION]) + inner


def _text(text: str) -> bytes:
  return _sized(0xD9, 1, len(text)) + text.encode("ascii")


def _sized(first: int, width: int, value: int) -> bytes:
  """A first byte of `_SIZED` and its length or number."""
  return bytes([first]) + value.to_bytes(width)
