"""Writes GGUF files: everything but the data first, then one tensor at a time."""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType, LlamaFileType

from lwm.convert.gguf.file import PLAIN_DTYPES, ROPE_FACTORS
from lwm.errors import UserError, disk_error

# Types of the matrices, by name, and what `general.file_type` calls a file of them. Vectors are
# always float32.
FILE_TYPES = {
  "F32": (TensorType.F32, LlamaFileType.ALL_F32),
  "F16": (TensorType.F16, LlamaFileType.MOSTLY_F16),
  "BF16": (TensorType.BF16, LlamaFileType.MOSTLY_BF16),
  "Q8_0": (TensorType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
  "Q4_0": (TensorType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
  "Q4_1": (TensorType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
}
# Matrices whose rows the blocks of a quantised type do not divide.
_UNDIVIDED = TensorType.F16
# Elements that are quantised at a time.
_CHUNK_ELEMENTS = 1 << 22


class GGUFSink:
  """A GGUF file that is being written: a `Sink`.

  Until it is complete it is called PATH.unfinished; after an error nothing is left of it.

  Attributes:
    path: the file.
    notes: a sentence about what the caller may not expect; usually none.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    file_type: str,
    rope_factors: np.ndarray | None = None,
  ):
    """Writes nothing yet.

    Args:
      path: must not exist.
      metadata: values by key, with `general.architecture`: numbers, strings, booleans, and lists.
      shapes: of each tensor, by name, in the order in which they will be written.
      file_type: a key of FILE_TYPES.
      rope_factors: as `GGUFSource.rope_factors`.
    """
    self.path = pathlib.Path(path)
    self._metadata = metadata
    self._factors = {} if rope_factors is None else {ROPE_FACTORS: rope_factors}
    shapes = {name: factors.shape for name, factors in self._factors.items()} | dict(shapes)
    self._matrices, self._file_type = FILE_TYPES[file_type]
    self._tensors = {name: (self._type(shape), shape) for name, shape in shapes.items()}
    undivided = [
      name
      for name, (kind, shape) in self._tensors.items()
      if len(shape) > 1 and kind != self._matrices
    ]
    self.notes = []
    if undivided:
      block, _ = gguf.GGML_QUANT_SIZES[self._matrices]
      self.notes.append(
        f"{len(undivided)} tensors, such as {undivided[0]}, are stored as {_UNDIVIDED.name}, "
        f"because blocks of {block} do not divide their rows"
      )
    self._unfinished = self._beside("unfinished")
    # The file of `write_beside`, if any: its unfinished and its final name.
    self._second: tuple[pathlib.Path, pathlib.Path] | None = None
    self._file: BinaryIO
    self._names = iter(self._tensors)

  def dtype(self, name: str) -> np.dtype:
    """The dtype that `write` takes a tensor in."""
    return PLAIN_DTYPES.get(self._tensors[name][0], np.dtype(np.float32))

  def __enter__(self) -> "GGUFSink":
    if self.path.exists():
      raise UserError(f"{self.path} exists: name another --output, or remove it.")
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._write_header()
      self._file = self._unfinished.open("ab")
      for name, factors in self._factors.items():
        self.write(name, factors)
    except BaseException as error:
      self._abandon(error)
      raise
    return self

  def __exit__(self, error_type: Any, error: BaseException | None, traceback: Any) -> None:
    try:
      if error is None:
        if missing := list(self._names):
          raise ValueError(f"{self.path}: tensors {missing} were not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._second:
          self._second[0].rename(self._second[1])
        self._unfinished.rename(self.path)
    except BaseException as failure:
      self._abandon(failure)
      raise
    if error is not None:
      self._abandon(error)

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes one tensor, in the dtype that `dtype` says and in the order of the constructor.

    Raises:
      UserError: a value is not finite.
    """
    kind, shape = self._tensors[name]
    if next(self._names) != name or array.shape != shape:
      raise ValueError(f"{self.path}: {name} of shape {array.shape} is not the next tensor")
    rows = array.reshape(-1, shape[-1])
    step = max(1, _CHUNK_ELEMENTS // shape[-1])
    written = 0
    for start in range(0, len(rows), step):
      chunk = rows[start : start + step]
      if not np.isfinite(chunk).all():
        raise UserError(
          f"{self.path}: the tensor {name} holds values that are not finite, at least as "
          f"{kind.name}: export it to BF16 or F32, or check the parameters."
        )
      if kind not in PLAIN_DTYPES:
        chunk = gguf.quants.quantize(chunk, kind)
      written += self._file.write(np.ascontiguousarray(chunk).view(np.uint8).data)
    self._file.write(bytes(-written % gguf.GGUF_DEFAULT_ALIGNMENT))

  def write_beside(self, suffix: str, text: str) -> None:
    """Writes a file PATH.SUFFIX, which gets its name when the GGUF file does."""
    self._second = self._beside(f"{suffix}.unfinished"), self._beside(suffix)
    self._second[0].write_text(text)

  def _beside(self, suffix: str) -> pathlib.Path:
    return self.path.with_name(f"{self.path.name}.{suffix}")

  def _type(self, shape: tuple[int, ...]) -> TensorType:
    if len(shape) == 1:
      return TensorType.F32
    block, _ = gguf.GGML_QUANT_SIZES[self._matrices]
    return _UNDIVIDED if shape[-1] % block else self._matrices

  def _write_header(self) -> None:
    metadata = dict(self._metadata)
    writer = gguf.GGUFWriter(self._unfinished, metadata.pop("general.architecture"))
    writer.add_type("model")
    writer.add_file_type(self._file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
      _ADD[type(value)](writer, key, value)
    for name, (kind, shape) in self._tensors.items():
      block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
      nbytes = math.prod(shape) // block * block_bytes
      writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with self._unfinished.open("ab") as file:
      file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))

  def _abandon(self, error: BaseException) -> None:
    """Removes the unfinished file. Raises UserError if it is the disk that has failed."""
    if hasattr(self, "_file"):
      with contextlib.suppress(OSError):
        self._file.close()
    self._unfinished.unlink(missing_ok=True)
    if self._second:
      self._second[0].unlink(missing_ok=True)
    if reason := disk_error(error):
      raise UserError(
        f"{self.path} could not be written ({reason}): fix the disk and run the same command again."
      ) from error


_ADD: dict[type, Callable[[gguf.GGUFWriter, str, Any], None]] = {
  bool: gguf.GGUFWriter.add_bool,
  int: gguf.GGUFWriter.add_uint32,
  float: gguf.GGUFWriter.add_float32,
  str: gguf.GGUFWriter.add_string,
  list: gguf.GGUFWriter.add_array,
}
