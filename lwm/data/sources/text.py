"""Reads a text file: one document."""

from collections.abc import Iterator
from typing import BinaryIO

from lwm.data.sources.record import check_encoding


def read(file: BinaryIO) -> Iterator[tuple[str, str]]:
  """Reads the file as one text, without its byte-order mark. Line ends stay as they are.

  Raises:
    ValueError: the file is not UTF-8, or contains a zero byte, as binary files do.
  """
  content = file.read()
  check_encoding(content)
  text = content.decode("utf-8-sig")
  if "\0" in text:
    raise ValueError(f"character {text.index('\0')} is a zero byte, so this is not a text file")
  yield "", text
