"""The safetensors format, read and written one tensor at a time.

A file is the length of a header (8 bytes, little-endian), the header, and the tensors' bytes one
after the other without gaps. The header is a JSON object: for each tensor its dtype, shape and
`data_offsets`, which count from the end of the header. A model is `model.safetensors`, or several
such files and `model.safetensors.index.json`, whose `weight_map` names the file of each tensor.
"""

import json
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple, Self

import ml_dtypes
import numpy as np

from lwm.checkpoint.arrays import ArrayInfo
from lwm.errors import UserError

_STEM = "model"
SINGLE = f"{_STEM}.safetensors"
INDEX = f"{SINGLE}.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The key of a header that is not a tensor.
_METADATA = "__metadata__"
# Size of a file of tensors, unless the user names another.
SHARD_BYTES = 5 * 10**9
# The limit of the format's reference implementation.
_MAX_HEADER_BYTES = 100_000_000


class _Place(NamedTuple):
  """Where a tensor is."""

  file: pathlib.Path
  offset: int


class SafetensorsSource:
  """The tensors of a directory; see `lwm.convert.tensors.Source`."""

  def __init__(self, directory: pathlib.Path, stem: str = _STEM):
    """Reads the headers of all files.

    Args:
      directory: of the files.
      stem: name of a single file, without its ending; of an index likewise.

    Raises:
      UserError: a file is missing or damaged, or holds a tensor that is not a float.
    """
    self.path = directory
    self.tensors: dict[str, ArrayInfo] = {}
    self._places: dict[str, _Place] = {}
    for file, names in _files(directory, stem).items():
      header = _read_header(file)
      if names is not None and (wrong := sorted(names ^ header.keys())):
        problem = "which its index names" if wrong[0] in names else "which its index does not name"
        verb = "lacks" if wrong[0] in names else "holds"
        raise UserError(f"{file} {verb} the tensor {wrong[0]}, {problem}: get all files again.")
      for name, (info, offset) in header.items():
        self.tensors[name] = info
        self._places[name] = _Place(file, offset)

  def leave_out(self, name: str) -> None:
    """Removes a tensor that means nothing for the model."""
    del self.tensors[name]

  def read(self, name: str) -> np.ndarray:
    """One tensor. Raises UserError if its file cannot be read."""
    info, place = self.tensors[name], self._places[name]
    try:
      data = np.fromfile(place.file, np.uint8, info.nbytes, offset=place.offset)
      return data.view(info.dtype).reshape(info.shape)
    except (OSError, ValueError) as error:
      raise UserError(f"{place.file}: {name} cannot be read: {error}.") from error


class SafetensorsSink:
  """Writes the tensors of a model into a directory; see `lwm.convert.tensors.Sink`.

  All offsets follow from the shapes, so each tensor goes straight to its place. The directory is
  the caller's, who removes it after an error.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    tensors: Mapping[str, ArrayInfo],
    shard_bytes: int,
    stem: str = _STEM,
  ):
    """Plans the files, and writes their index if there are several.

    Args:
      directory: exists.
      tensors: shape and dtype of each tensor, in the order in which they will be written.
      shard_bytes: size of a file, at most, except that each holds at least one tensor.
      stem: as in `SafetensorsSource`.
    """
    self._tensors = tensors
    self._directory = directory
    self._file: BinaryIO | None = None
    shards = _shards(tensors, shard_bytes)
    # The names that each file begins with.
    self._starts: dict[str, tuple[str, list[str]]] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
      shard = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
      file = f"{stem}{shard}.safetensors"
      self._starts[names[0]] = file, names
      weight_map |= dict.fromkeys(names, file)
    self._left = list(tensors)[::-1]
    if len(shards) > 1:
      size = sum(info.nbytes for info in tensors.values())
      index = {"metadata": {"total_size": size}, "weight_map": weight_map}
      (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

  def __enter__(self) -> Self:
    return self

  def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
    if self._file:
      self._file.close()
    if error is None and self._left:
      raise ValueError(f"{self._left[-1]} was not written")

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes the next tensor, which must have the planned name, shape and dtype."""
    if name != self._left.pop() or ArrayInfo(array.shape, array.dtype) != self._tensors[name]:
      raise ValueError(f"{name} is not the tensor that comes next, or is not as planned")
    if name in self._starts:
      if self._file:
        self._file.close()
      file, names = self._starts[name]
      self._file = (self._directory / file).open("xb")
      self._file.write(_header({name: self._tensors[name] for name in names}))
    assert self._file
    self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file. Raises UserError if there is none."""
  try:
    content = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}.") from error
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not JSON: {error}.") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} holds a JSON {type(content).__name__}, not an object.")
  return content


def _files(directory: pathlib.Path, stem: str) -> dict[pathlib.Path, set[str] | None]:
  """The files of a model, and the tensors that the index says are in each; None without index."""
  single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
  if single.exists():
    return {single: None}
  if not index.exists():
    if any((directory / name).exists() for name in _PICKLED):
      raise UserError(
        f"{directory} holds pickles (pytorch_model.bin), which can execute code: save the model "
        "with transformers' save_pretrained, which writes safetensors."
      )
    raise UserError(
      f"{directory} has neither {single.name} nor {index.name}: get all files of the model."
    )
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f"{index} has no weight_map: get the file again.")
  files: dict[pathlib.Path, set[str] | None] = {}
  for name, file in weight_map.items():
    # Anything but a plain name could be a file outside of the directory.
    is_plain = isinstance(file, str) and pathlib.PurePath(file).name == file and "\0" not in file
    if not is_plain or not file.endswith(".safetensors"):
      raise UserError(
        f"{index} puts {name} into {file!r}, which is not a safetensors file beside it: do not "
        "trust the model."
      )
    path = directory / file
    if path not in files and not os.path.isfile(path):
      raise UserError(f"{path} is missing, which holds {name}: get all files of the model.")
    names = files.setdefault(path, set())
    assert names is not None
    names.add(name)
  return files


def _read_header(path: pathlib.Path) -> dict[str, tuple[ArrayInfo, int]]:
  """Shape and dtype of each tensor in a file, and where it begins in the file."""
  try:
    with path.open("rb") as file:
      size = file.seek(0, 2)
      file.seek(0)
      (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
      if length > min(_MAX_HEADER_BYTES, size - 8):
        raise _damaged(path, "its header does not fit into it")
      text = file.read(length)
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}.") from error
  try:
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    header.pop(_METADATA, None)
    entries = [(name, *_entry(entry)) for name, entry in header.items()]
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise _damaged(path, "its header is not one") from error
  tensors = {}
  end = 0
  for name, dtype, shape, start, stop in sorted(entries, key=lambda entry: entry[3:]):
    if dtype not in _DTYPES:
      raise UserError(
        f"{path}: the tensor {name} is {dtype}, not one of {', '.join(_DTYPES)}: save the model in "
        "one of these, without quantisation."
      )
    info = ArrayInfo(shape, _DTYPES[dtype])
    if start != end:
      raise _damaged(path, f"the tensor {name} does not begin where the one before it ends")
    if stop - start != info.nbytes:
      raise _damaged(path, f"the tensor {name} has {stop - start} bytes, not {info.nbytes}")
    end = stop
    if 8 + length + end > size:
      raise _damaged(path, f"it ends before the end of the tensor {name}")
    tensors[name] = info, 8 + length + start
  if 8 + length + end < size:
    raise _damaged(path, "it goes on after its last tensor")
  return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if len(dict(pairs)) < len(pairs):
    raise ValueError("a name occurs twice")
  return dict(pairs)


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
  start, stop = entry["data_offsets"]
  shape = tuple(entry["shape"])
  if any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
    raise ValueError("not a size")
  return str(entry["dtype"]), shape, start, stop


def _damaged(path: pathlib.Path, why: str) -> UserError:
  return UserError(f"{path} is damaged: {why}: get the file again.")


def _shards(tensors: Mapping[str, ArrayInfo], shard_bytes: int) -> list[list[str]]:
  """The names of the tensors of each file."""
  shards: list[list[str]] = []
  room = 0
  for name, info in tensors.items():
    if not shards or info.nbytes > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(name)
    room -= info.nbytes
  return shards


def _header(tensors: Mapping[str, ArrayInfo]) -> bytes:
  """What precedes the tensors of a file."""
  # transformers reads only files that say so.
  header: dict[str, Any] = {_METADATA: {"format": "pt"}}
  end = 0
  for name, info in tensors.items():
    start, end = end, end + info.nbytes
    header[name] = {
      "dtype": _DTYPE_NAMES[info.dtype],
      "shape": list(info.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  # Tensors begin at multiples of 8, as the format's reference implementation wants.
  text += b" " * (-len(text) % 8)
  return struct.pack("<Q", len(text)) + text
