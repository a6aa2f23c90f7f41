"""What a file format of weights offers: its tensors, one at a time."""

import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np

from lwm.checkpoint.arrays import ArrayInfo


class Source(Protocol):
  """Weights to read.

  Attributes:
    path: the file or directory; messages name it.
    tensors: shape and dtype of each tensor, by its name. A quantised tensor has the shape and the
      dtype, float32, of what `read` returns.
  """

  @property
  def path(self) -> pathlib.Path: ...

  @property
  def tensors(self) -> Mapping[str, ArrayInfo]: ...

  def read(self, name: str) -> np.ndarray:
    """One tensor. Raises UserError, with the file and the name, if it cannot be read."""
    ...


class Sink(Protocol):
  """Weights to write: a context manager that leaves them complete, or nothing.

  It knows the names, shapes and dtypes of all tensors from its constructor.
  """

  def __enter__(self) -> Self: ...

  def __exit__(self, error_type: Any, error: Any, traceback: Any) -> bool | None: ...

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes one tensor, in its final dtype. Each is written once, in the order of the table."""
    ...
