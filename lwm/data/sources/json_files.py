"""Reads JSON files: one object per line, or one array of objects."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from lwm.data.sources.record import Problem, Value, check_encoding, fields, reason


def read_lines(file: BinaryIO) -> Iterator[tuple[str, Value | Problem]]:
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

  Many `.json` files of public datasets hold one object per line.

  Raises:
    ValueError: the file is UTF-16 or UTF-32.
  """
  start = file.peek(64)  # type: ignore[attr-defined]  # Readers are given buffered files.
  if not start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
    yield from read_lines(file)
    return
  values = _parse(file.read())
  if isinstance(values, Problem):
    yield "", values
    return
  for number, value in enumerate(values, start=1):
    yield str(number), _object(value)


def _parse(content: bytes) -> Any:
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
