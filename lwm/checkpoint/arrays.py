"""The arrays of a checkpoint, read and written one layer at a time.

Orbax reads and writes whole trees. Converting a model must not need the memory of one, so this file
opens the arrays of an item with TensorStore, in the format that Orbax uses: a zarr array per
parameter in one OCDBT database, and `_METADATA`, which describes the tree.

Paths are dotted, as in "blocks.attention.query". The first axis of a parameter of a stretch of
layers is the layer.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from lwm.errors import UserError

_TREE = "_METADATA"
# Larger arrays are stored in chunks of about this size, so that a device can read its shard alone.
_CHUNK_BYTES = 1 << 26
# Paths that begin so have an axis of layers.
_STRETCH = "blocks"


# The part of an array that is meant: indices and slices of its first axes; () is the whole array.
Index = tuple[int | slice, ...]


class ArrayInfo(NamedTuple):
  """What is known of an array before it is read."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def layers(path: str, shape: tuple[int, ...]) -> list[Index]:
  """Where the layers of a parameter are; the whole parameter if it has no axis of layers."""
  return [(layer,) for layer in range(shape[0])] if _is_stacked(path) else [()]


def _is_stacked(path: str) -> bool:
  """Whether the first axis of a parameter is the layers of a stretch."""
  return path.startswith(_STRETCH)


class ArrayWriter:
  """Writes the arrays of one item.

      with ArrayWriter(directory, arrays) as writer:
        writer.write("blocks.attention.query", query_MxHxD, (0,))

  Only what is being written is in memory.

  Attributes:
    item: the directory.
  """

  def __init__(self, item: pathlib.Path, arrays: Mapping[str, ArrayInfo]):
    """Creates the item's directory.

    Args:
      item: must not exist.
      arrays: shape and dtype of each array, by path.
    """
    self.item = item
    item.mkdir(parents=True)
    tree = {}
    for path, info in arrays.items():
      keys = path.split(".")
      tree[str(tuple(keys))] = {
        "key_metadata": [{"key": key, "key_type": 2} for key in keys],
        "value_metadata": {
          "value_type": "jax.Array",
          "skip_deserialize": False,
          "write_shape": list(info.shape),
        },
      }
    (item / _TREE).write_text(
      json.dumps(
        {
          "tree_metadata": tree,
          "use_ocdbt": True,
          "use_zarr3": False,
          "store_array_data_equal_to_fill_value": True,
          "custom_metadata": None,
        }
      )
    )
    self._context = _context()
    self._stores = {
      path: ts.open(
        _spec(item, path)
        | {
          "create": True,
          "dtype": info.dtype.name,
          "metadata": {
            "shape": list(info.shape),
            "chunks": _chunks(path, info),
            "compressor": {"id": "zstd", "level": 1},
          },
          "store_data_equal_to_fill_value": True,
        },
        context=self._context,
      ).result()
      for path, info in arrays.items()
    }
    # Number of elements of each array that were not written yet.
    self._missing = {path: math.prod(info.shape) for path, info in arrays.items()}

  def __enter__(self) -> "ArrayWriter":
    return self

  def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
    if error is None:
      self.close()

  def write(self, path: str, array: np.ndarray, where: Index = ()) -> None:
    """Writes an array, or the part of it at `where`, in its final dtype. Each part once."""
    self._missing[path] -= array.size
    self._stores[path][where].write(array).result()

  def close(self) -> None:
    """Raises ValueError, with the path, if a part of an array was never written."""
    for path, missing in self._missing.items():
      if missing:
        raise ValueError(f"{path}: {missing} elements were not written")


class ArrayReader:
  """Reads the arrays of one item; only what is asked for is in memory.

  Attributes:
    arrays: shape and dtype of each array, by path.
  """

  def __init__(self, item: pathlib.Path):
    """Raises UserError if the item's description or an array's header cannot be read."""
    self._item = item
    context = _context()
    try:
      tree = json.loads((item / _TREE).read_text())["tree_metadata"]
      paths = [".".join(entry["key"] for entry in leaf["key_metadata"]) for leaf in tree.values()]
      self._stores = {
        path: ts.open(_spec(item, path) | {"open": True}, read=True, context=context).result()
        for path in paths
      }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f"{item} cannot be read as the arrays of a checkpoint: restore it from a copy."
      ) from error
    self.arrays = {
      path: ArrayInfo(store.shape, store.dtype.numpy_dtype) for path, store in self._stores.items()
    }

  def read(self, path: str, where: Index = ()) -> np.ndarray:
    """An array, or the part of it at `where`. Raises UserError if the file is damaged."""
    try:
      return self._stores[path][where].read().result()
    except ValueError as error:
      raise UserError(f"{self._item}: {path} is damaged: restore it from a copy.") from error


def _spec(item: pathlib.Path, path: str) -> dict[str, Any]:
  base = f"file://{os.path.abspath(item)}/"
  return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": path + "/"}}


def _context() -> ts.Context:
  # Nothing is read twice, so a cache would only take memory.
  return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


def _chunks(path: str, info: ArrayInfo) -> list[int]:
  """The shape of a chunk: at most one layer, divided along its first axis if it is large."""
  leading = 1 if _is_stacked(path) else 0
  chunk = [1] * leading + list(info.shape[leading:])
  if len(chunk) > leading:
    row = math.prod(chunk[leading + 1 :]) * info.dtype.itemsize
    chunk[leading] = max(1, min(chunk[leading], _CHUNK_BYTES // max(row, 1)))
  return chunk
