"""Where raw documents come from: text files, JSON lines, TensorFlow Datasets.

A source is an iterator of records. What cannot be read is a record too, with its problem said, so
that one bad line or file ends no run.
"""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from lwm.errors import UserError


class Record(NamedTuple):
  """A raw document, or the problem that it has instead."""

  # What the split and the choice of an alternative hang on: the path below the input, and the line.
  key: str
  # For the report of bad records: the path from here, and the line.
  where: str
  # What the manifest counts documents by.
  source: str
  # The text, or the JSON object.
  value: str | dict[str, Any] | None
  problem: str = ""


def text_files(path: str | os.PathLike, suffix: str = ".txt") -> Iterator[Record]:
  """One document a file: a file, or all files of a folder and below whose names end in `suffix`.

  Hidden files and folders are left out.

  Raises:
    UserError: there are none.
  """
  root = pathlib.Path(path)
  for file in _files(root, suffix):
    key = _name(file, root)
    try:
      yield Record(key, str(file), root.name, file.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
      yield Record(key, str(file), root.name, None, _unreadable(error))


def jsonl_files(path: str | os.PathLike, suffix: str = ".jsonl") -> Iterator[Record]:
  """One JSON object a line: a file, or all files of a folder and below that end in `suffix`.

  Hidden files and folders are left out. Blank lines are no records.

  Raises:
    UserError: there are no files.
  """
  root = pathlib.Path(path)
  for file in _files(root, suffix):
    name = _name(file, root)
    try:
      with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
          if line.strip():
            value, problem = _parse(line)
            yield Record(f"{name}:{number}", f"{file}:{number}", name, value, problem)
    except OSError as error:
      yield Record(name, str(file), name, None, _unreadable(error))


def tfds_records(
  name: str, split: str = "train", feature: str = "text", data_dir: str | None = None
) -> Iterator[Record]:
  """A TensorFlow Datasets dataset, by name (prepared if need be) or by the directory that it is in.

  Args:
    name: such as `lm1b` or `wiki40b/en:1.3.0`, or a directory with a dataset_info.json.
    split: in the syntax of TFDS.
    feature: the feature that holds the text.
    data_dir: where TFDS keeps its datasets; its own default if None.

  Raises:
    UserError: no such dataset, split or feature, or it needs TensorFlow to prepare or read.
  """
  try:
    if pathlib.Path(name).is_dir():
      examples = tfds.builder_from_directory(name).as_data_source(split)
    else:
      examples = tfds.data_source(
        name, split=split, data_dir=data_dir, builder_kwargs={"file_format": "array_record"}
      )
  except Exception as error:  # TFDS raises all kinds, from a missing name to a failed download.
    reason = str(error).strip().partition("\n")[0]
    raise UserError(f"Could not open TFDS dataset {name!r}, split {split!r}: {reason}") from error
  features = examples.dataset_info.features
  if feature not in features:
    names = ", ".join(sorted(features))
    raise UserError(f"TFDS dataset {name!r} has no feature {feature!r}, only {names}.")
  for index in range(len(examples)):
    key = f"{split}:{index}"
    where = f"{name}/{key}"
    try:
      text = examples[index][feature]
      text = text.decode("utf-8") if isinstance(text, bytes) else str(text)
    except Exception as error:  # ArrayRecord and TFDS raise all kinds.
      yield Record(key, where, name, None, _unreadable(error))
    else:
      yield Record(key, where, name, text)


def _files(root: pathlib.Path, suffix: str) -> list[pathlib.Path]:
  if root.is_dir():
    files = sorted(
      file
      for file in root.rglob(f"*{suffix}")
      if file.is_file() and not any(p.startswith(".") for p in file.relative_to(root).parts)
    )
    if not files:
      raise UserError(f"There is no file that ends in {suffix} in {root}: take another suffix.")
    return files
  if not root.exists():
    raise UserError(f"There is no input {root}.")
  return [root]


def _name(file: pathlib.Path, root: pathlib.Path) -> str:
  return file.name if file == root else str(file.relative_to(root))


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str]:
  try:
    value = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    return None, _unreadable(error)
  except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits.
    return None, f"not JSON: {error}"
  if not isinstance(value, dict):
    return None, f"a JSON {type(value).__name__}, not an object"
  return value, ""


def _unreadable(error: Exception) -> str:
  if isinstance(error, UnicodeDecodeError):
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}"
  return f"cannot be read: {str(error).partition('\n')[0]}"
