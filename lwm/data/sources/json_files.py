"""Reads JSON files: one object per line, or one array of objects."""

import codecs
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from lwm.data.sources.record import Problem, Value, check_encoding, fields, reason


def read_lines(file: Iterable[bytes]) -> Iterator[tuple[str, Value | Problem]]:
  """Reads one object per line, numbered by line. Blank lines are not records.

  Raises:
    ValueError: the file is UTF-16 or UTF-32.
  """
  for number, line in enumerate(file, start=1):
    if number == 1:
      check_encoding(line)
    if line.strip():
      yield str(number), _object(_parse(line))


def read_array(file: BinaryIO) -> Iterator[tuple[str, Value | Problem]]:
  """Reads the objects of one array. A file that does not begin with `[` is read line by line.

  Many `.json` files of public datasets hold one object per line. One object over several lines is
  a Problem: it may hold the records in any form.

  Raises:
    ValueError: the file is UTF-16 or UTF-32.
  """
  content = bytearray()
  for line in file:
    content += line
    if line.removeprefix(codecs.BOM_UTF8).strip():
      break
  start = content.removeprefix(codecs.BOM_UTF8).lstrip()
  if start.startswith(b"["):
    yield from _array(_parse(content + file.read()))
    return
  if isinstance(_parse(start), Problem):
    content += file.read()
    if isinstance(_parse(content), dict):
      yield "", Problem("holds one JSON object, not an array or one object per line")
      return
  yield from read_lines(itertools.chain(io.BytesIO(content), file))


def _array(values: Any) -> Iterator[tuple[str, Value | Problem]]:
  if isinstance(values, Problem):
    yield "", values
    return
  for number, value in enumerate(values, start=1):
    yield str(number), _object(value)


def _parse(content: bytes | bytearray) -> Any:
  try:
    # In files that were joined end to end, any line may begin with a byte-order mark.
    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=fields)
  except UnicodeDecodeError as error:
    return Problem(reason(error))
  except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits.
    return Problem(f"not JSON: {error}")


def _object(value: Any) -> dict[str, Any] | Problem:
  if isinstance(value, dict | Problem):
    return value
  return Problem(f"a JSON {type(value).__name__}, not an object")
