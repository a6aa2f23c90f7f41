"""Picking one of several implementations of an operation: by name, or the best that runs here."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax


class Backend(Protocol):
  """What the operations' own records of a backend have in common.

  `unsupported(query, key)` is a clause saying what stands against these shapes and dtypes on this
  platform and what would work, or None.
  """

  name: str
  unsupported: Callable[[jax.Array, Any], str | None]


def choose(
  operation: str, backends: Sequence[Backend], name: str | None, query: jax.Array, key: Any
) -> Backend:
  """The backend of that name, or without a name the first that supports the arguments.

  Args:
    operation: for messages, say "attention".
    backends: the best first; one of them takes everything.
    name: of one of them, or None.
    query: an array or its shape and dtype.
    key: likewise, as the operation takes it.

  Raises:
    ValueError: no backend has this name, or it does not support the arguments.
  """
  if name is None:
    return next(backend for backend in backends if backend.unsupported(query, key) is None)
  named = {backend.name: backend for backend in backends}
  if name not in named:
    raise ValueError(f"There is no {operation} backend {name!r} here: use one of {list(named)}.")
  reason = named[name].unsupported(query, key)
  if reason is not None:
    raise ValueError(f"{operation.capitalize()} backend {name!r} cannot run this: {reason}.")
  return named[name]
