"""Picks one of several implementations of an operation: by name, or the best that runs here."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Backend(Protocol):
  """The fields that the backends of all operations share.

  `unsupported(query, key)` returns None if the backend runs these shapes and dtypes on this
  platform, else a clause that says why not and what to use instead.
  """

  @property
  def name(self) -> str: ...

  @property
  def unsupported(self) -> Callable[[Any, Any], str | None]: ...


def choose[B: Backend](
  operation: str, backends: Sequence[B], name: str | None, query: Any, key: Any
) -> B:
  """Returns the backend called `name`, or if that is None the first that supports the arguments.

  Args:
    operation: for messages, such as "attention".
    backends: the best first; one of them supports everything.
    name: the name of one of them, or None.
    query: an array, or a `jax.ShapeDtypeStruct`.
    key: likewise, in the form that the operation takes.

  Raises:
    ValueError: no backend has this name, or it does not support the arguments.
  """
  if name is None:
    return next(backend for backend in backends if backend.unsupported(query, key) is None)
  named = {backend.name: backend for backend in backends}
  if name not in named:
    raise ValueError(f"There is no {operation} backend {name!r}: use one of {list(named)}.")
  reason = named[name].unsupported(query, key)
  if reason is not None:
    raise ValueError(f"{operation.capitalize()} backend {name!r} cannot run this: {reason}.")
  return named[name]
