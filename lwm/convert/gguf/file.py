"""Reads GGUF files: metadata and tensors, dequantised one at a time.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a header with the counts,
the metadata as pairs of key and typed value, the name, shape, type and offset of each tensor, and
the aligned data. Shapes are stored innermost dimension first; here they are NumPy's. The `gguf`
package has a reader too, but it trusts the counts in a file: a damaged one can make it run or
allocate without end. This one checks every count against the size of the file.
"""

import math
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import gguf
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as TensorType, GGUFValueType as ValueType

from lwm.checkpoint.arrays import ArrayInfo
from lwm.errors import UserError

# Types that are read as they are; all others are dequantised to float32.
PLAIN_DTYPES = {
  TensorType.F32: np.dtype(np.float32),
  TensorType.F16: np.dtype(np.float16),
  TensorType.BF16: np.dtype(jnp.bfloat16),
}
_VERSIONS = (2, 3)
_SCALARS = {
  ValueType.UINT8: "B",
  ValueType.INT8: "b",
  ValueType.UINT16: "H",
  ValueType.INT16: "h",
  ValueType.UINT32: "I",
  ValueType.INT32: "i",
  ValueType.FLOAT32: "f",
  ValueType.UINT64: "Q",
  ValueType.INT64: "q",
  ValueType.FLOAT64: "d",
  ValueType.BOOL: "?",
}
_MOST_DIMENSIONS = 4
# Not a parameter: what Llama-3 scaling divides the rotary frequencies by.
ROPE_FACTORS = "rope_freqs.weight"
# Elements that are dequantised at a time.
_CHUNK_ELEMENTS = 1 << 24


class _StoredTensor(NamedTuple):
  type: TensorType
  shape: tuple[int, ...]
  # From the start of the file.
  offset: int
  row_bytes: int

  @property
  def info(self) -> ArrayInfo:
    """Of the tensor as it is read."""
    return ArrayInfo(self.shape, PLAIN_DTYPES.get(self.type, np.dtype(np.float32)))


class GGUFSource:
  """The tensors and the metadata of a GGUF file: a `Source`.

  Attributes:
    path: the file.
    metadata: values by key: numbers, strings, booleans, and lists of one of these.
    tensors: shape and dtype of each parameter, by name. Quantised tensors are read as float32.
    rope_factors: divisor of each rotary frequency, float32 [P] for P pairs of a head, or None.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Reads everything but the tensors' data.

    Raises:
      UserError: it is not a GGUF file, or it is damaged, or one of its tensors has an unknown type.
    """
    self.path = pathlib.Path(path)
    try:
      with self.path.open("rb") as file:
        self.metadata, self._stored = _Header(self.path, file).read()
    except OSError as error:
      raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    self.tensors: Mapping[str, ArrayInfo] = {
      name: tensor.info for name, tensor in self._stored.items() if name != ROPE_FACTORS
    }
    self.rope_factors: np.ndarray | None = None
    if ROPE_FACTORS in self._stored:
      self.rope_factors = self.read(ROPE_FACTORS).astype(np.float32)

  def read(self, name: str) -> np.ndarray:
    """One tensor. Raises UserError, with the file and the name, if it cannot be read."""
    tensor = self._stored[name]
    array = np.empty(*tensor.info)
    rows = array.reshape(-1, tensor.shape[-1])
    step = max(1, _CHUNK_ELEMENTS // tensor.shape[-1])
    try:
      with self.path.open("rb") as file:
        file.seek(tensor.offset)
        for start in range(0, len(rows), step):
          chunk = rows[start : start + step]
          content = file.read(len(chunk) * tensor.row_bytes)
          data = np.frombuffer(content, np.uint8).reshape(len(chunk), tensor.row_bytes)
          if tensor.type in PLAIN_DTYPES:
            chunk[...] = data.view(array.dtype)
          else:
            chunk[...] = gguf.quants.dequantize(data, tensor.type)
    except (OSError, ValueError) as error:
      # The header was checked, so the file has changed or the disk fails.
      raise UserError(f"{self.path}: the tensor {name} cannot be read: {error}.") from error
    return array


class _Header:
  """Reads the part of the file before the tensors' data."""

  def __init__(self, path: pathlib.Path, file: BinaryIO):
    self._path = path
    self._file = file
    self._size = os.fstat(file.fileno()).st_size
    # Name of the part that is being read, for messages.
    self._place = "the header"

  def read(self) -> tuple[dict[str, Any], dict[str, _StoredTensor]]:
    """The metadata and the tensors, by name."""
    if self._file.read(4) != b"GGUF":
      raise UserError(f"{self._path} is not a GGUF file: name one, or another format's directory.")
    version = self._scalar(ValueType.UINT32)
    if version not in _VERSIONS:
      raise UserError(
        f"{self._path} is GGUF of version {version} or of another byte order: convert it to "
        "little-endian version 3."
      )
    num_tensors, num_keys = self._scalar(ValueType.UINT64), self._scalar(ValueType.UINT64)
    metadata: dict[str, Any] = {}
    for number in range(num_keys):
      self._place = f"metadata key {number}"
      key = self._string()
      self._place = f"the key {key}"
      if key in metadata:
        raise self._damaged("occurs twice")
      metadata[key] = self._value(self._value_type())
    # Tensors have their shape, type and offset in the aligned data.
    infos: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
    for number in range(num_tensors):
      self._place = f"tensor {number}"
      name = self._string()
      self._place = f"the tensor {name}"
      if name in infos:
        raise self._damaged("occurs twice")
      infos[name] = self._tensor_info()
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
      self._place = "the key general.alignment"
      raise self._damaged(f"is {alignment!r}")
    data = -(-self._file.tell() // alignment) * alignment
    return metadata, dict(self._stored(infos, data))

  def _stored(
    self, infos: Mapping[str, tuple[TensorType, tuple[int, ...], int]], data: int
  ) -> Iterator[tuple[str, _StoredTensor]]:
    """The tensors, each checked to lie inside the file, whose aligned data begin at `data`."""
    for name, (kind, shape, offset) in infos.items():
      self._place = f"the tensor {name}"
      block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
      if shape[-1] % block:
        raise self._damaged(f"has rows of {shape[-1]}, which blocks of {block} do not divide")
      row_bytes = shape[-1] // block * block_bytes
      stop = data + offset + math.prod(shape[:-1]) * row_bytes
      if stop > self._size:
        raise self._damaged(f"ends at byte {stop} of {self._size}")
      yield name, _StoredTensor(kind, shape, data + offset, row_bytes)

  def _tensor_info(self) -> tuple[TensorType, tuple[int, ...], int]:
    num_dimensions = self._scalar(ValueType.UINT32)
    if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
      raise self._damaged(f"has {num_dimensions} dimensions")
    shape = tuple(self._scalar(ValueType.UINT64) for _ in range(num_dimensions))[::-1]
    if not all(shape):
      raise self._damaged(f"has shape {shape}")
    number = self._scalar(ValueType.UINT32)
    try:
      kind = TensorType(number)
      # An empty tensor tells whether this type can be dequantised.
      gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError) as error:
      named = f"{number} ({kind.name})" if number in iter(TensorType) else number
      raise UserError(
        f"{self._path}: {self._place} has type {named}, which cannot be read: quantise the model "
        "to another type."
      ) from error
    return kind, shape, self._scalar(ValueType.UINT64)

  def _value_type(self) -> ValueType:
    number = self._scalar(ValueType.UINT32)
    try:
      return ValueType(number)
    except ValueError as error:
      raise self._damaged(f"has the unknown type {number}") from error

  def _value(self, kind: ValueType) -> Any:
    if kind is ValueType.STRING:
      return self._string()
    if kind is not ValueType.ARRAY:
      return self._scalar(kind)
    kind = self._value_type()
    count = self._scalar(ValueType.UINT64)
    if kind is ValueType.ARRAY:
      raise self._damaged("is an array of arrays")
    if kind is ValueType.STRING:
      # Each string takes 8 bytes or more, so a wrong count meets the end of the file.
      return [self._string() for _ in range(count)]
    data = self._bytes(count * struct.calcsize(_SCALARS[kind]))
    return np.frombuffer(data, "<" + _SCALARS[kind]).tolist()

  def _scalar(self, kind: ValueType) -> Any:
    code = "<" + _SCALARS[kind]
    return struct.unpack(code, self._bytes(struct.calcsize(code)))[0]

  def _string(self) -> str:
    data = self._bytes(self._scalar(ValueType.UINT64))
    try:
      return data.decode("utf-8")
    except UnicodeDecodeError as error:
      raise self._damaged("is not UTF-8") from error

  def _bytes(self, count: int) -> bytes:
    if count > self._size - self._file.tell():
      raise self._damaged("ends after the file")
    return self._file.read(count)

  def _damaged(self, what: str) -> UserError:
    return UserError(f"{self._path} is damaged: {self._place} {what}: get the file again.")
