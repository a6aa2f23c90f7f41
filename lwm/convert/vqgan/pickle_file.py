"""Reads the arrays of a pickle without running anything that is in it.

LWM's VQGAN is a pickle of nested dictionaries of arrays. Python's `pickle.load` calls whatever a
pickle names. Here a small interpreter of the pickle machine (`pickletools` has its operations)
keeps every value as plain data: it imports nothing, calls nothing by name, and sets no attribute. A
pickle that names anything except the constructors below is refused.
"""

import enum
import math
import mmap
import os
import pathlib
import pickletools
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from lwm.errors import UserError


class _Named(enum.Enum):
  """What a pickle of arrays may name."""

  NDARRAY = enum.auto()
  DTYPE = enum.auto()
  BFLOAT16 = enum.auto()
  # Makes an empty array, whose content follows as its state.
  RECONSTRUCT = enum.auto()
  # Makes a whole array (pickle protocol 5).
  FROM_BUFFER = enum.auto()
  # Makes an array of JAX out of what would make one of NumPy.
  JAX_ARRAY = enum.auto()
  FROZEN_DICT = enum.auto()


_ALLOWED = {
  ("numpy", "ndarray"): _Named.NDARRAY,
  ("numpy", "dtype"): _Named.DTYPE,
  ("ml_dtypes", "bfloat16"): _Named.BFLOAT16,
  # NumPy 1 and 2.
  ("numpy.core.multiarray", "_reconstruct"): _Named.RECONSTRUCT,
  ("numpy._core.multiarray", "_reconstruct"): _Named.RECONSTRUCT,
  ("numpy.core.numeric", "_frombuffer"): _Named.FROM_BUFFER,
  ("numpy._core.numeric", "_frombuffer"): _Named.FROM_BUFFER,
  # JAX before and since 0.4.
  ("jax._src.device_array", "reconstruct_device_array"): _Named.JAX_ARRAY,
  ("jax._src.array", "_reconstruct_array"): _Named.JAX_ARRAY,
  ("flax.core.frozen_dict", "FrozenDict"): _Named.FROZEN_DICT,
}
_DTYPES = {"f2": np.float16, "f4": np.float32, "f8": np.float64, _Named.BFLOAT16: jnp.bfloat16}
# Nested dictionaries of parameters have about five levels.
_MOST_LEVELS = 32
# A pickle of a few hundred arrays has about 30 operations per array.
_MOST_OPERATIONS = 1_000_000


class _Dtype:
  """A dtype whose byte order follows as its state."""

  def __init__(self, dtype: np.dtype):
    self.dtype = dtype


class _Array:
  """An array whose content may still follow as its state."""

  def __init__(self, content: np.ndarray | None = None):
    self.content = content


def read_pickle(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """The arrays of a pickle of nested dictionaries, by their keys joined with "/".

  Args:
    path: a pickle (protocol 3 or newer) with float16, bfloat16, float32 or float64 arrays of NumPy
      or JAX.

  Raises:
    UserError: it holds or names anything else, or is damaged. Nothing in it has been executed.
  """
  path = pathlib.Path(path)
  try:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
      return _flat(_interpret(content))  # type: ignore[arg-type]  # an mmap reads like a file
  except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
    reason = error.args[0] if isinstance(error, _Refused) else "it is damaged"
    raise UserError(
      f"{path} is not a pickle of nested dictionaries of arrays: {reason}; nothing in it was "
      "executed."
    ) from error


class _Refused(ValueError):
  """The pickle holds something that is not allowed; the message is the reason."""


def _interpret(file: BinaryIO) -> Any:
  """The value of the pickle, with `_Named`, `_Dtype` and `_Array` for what it constructs."""
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[Any, Any] = {}

  def since_mark() -> list[Any]:
    start = marks.pop()
    items = stack[start:]
    del stack[start:]
    return items

  for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
    if number == _MOST_OPERATIONS:
      raise _Refused(f"it has more than {_MOST_OPERATIONS} operations")
    match opcode.name:
      case "PROTO" | "FRAME":
        pass
      case "STOP":
        return stack.pop()
      case "MARK":
        marks.append(len(stack))
      case "NONE":
        stack.append(None)
      case "NEWTRUE" | "NEWFALSE":
        stack.append(opcode.name == "NEWTRUE")
      case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
        stack.append(argument)
      case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
        stack.append(argument)
      case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
        stack.append(argument)
      case "BINPUT" | "LONG_BINPUT":
        memo[argument] = stack[-1]
      case "MEMOIZE":
        memo[len(memo)] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        stack.append(memo[argument])
      case "EMPTY_TUPLE":
        stack.append(())
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        count = int(opcode.name[-1])
        stack[-count:] = [tuple(stack[-count:])]
      case "TUPLE":
        stack.append(tuple(since_mark()))
      case "EMPTY_DICT":
        stack.append({})
      case "SETITEM":
        value, key = stack.pop(), stack.pop()
        _set_items(stack[-1], [key], [value])
      case "SETITEMS":
        items = since_mark()
        _set_items(stack[-1], items[::2], items[1::2])
      case "GLOBAL":
        stack.append(_named(*str(argument).split(" ")))
      case "STACK_GLOBAL":
        name, module = stack.pop(), stack.pop()
        stack.append(_named(module, name))
      case "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_construct(function, arguments))
      case "BUILD":
        state = stack.pop()
        _set_state(stack[-1], state)
      case other:
        raise _Refused(f"it uses the pickle operation {other}")
  raise _Refused("it ends too early")


def _named(module: Any, name: Any) -> _Named:
  if not (isinstance(module, str) and isinstance(name, str)):
    raise _Refused("it calls something that has no name")
  if (module, name) not in _ALLOWED:
    raise _Refused(f"it names {_short(f'{module}.{name}')}")
  return _ALLOWED[module, name]


def _set_items(target: Any, keys: list[Any], values: list[Any]) -> None:
  if not isinstance(target, dict) or not all(
    isinstance(key, str) and "/" not in key for key in keys
  ):
    raise _Refused("the keys of its dictionaries are not all names without a slash")
  target.update(zip(keys, values, strict=True))


def _construct(function: Any, arguments: Any) -> Any:
  """What the pickle calls. Arguments of a wrong number or type are a TypeError or ValueError."""
  match function:
    case _Named.DTYPE:
      name, _, _ = arguments
      if not isinstance(name, str | _Named) or name not in _DTYPES:
        raise _Refused("it holds arrays of other types than float16, bfloat16, float32, float64")
      return _Dtype(np.dtype(_DTYPES[name]))
    case _Named.RECONSTRUCT:
      if arguments[0] is not _Named.NDARRAY:
        raise _Refused("it holds arrays that are not NumPy's")
      return _Array()
    case _Named.FROM_BUFFER:
      data, dtype, shape, order = arguments
      return _Array(_content(dtype, shape, data, order))
    case _Named.JAX_ARRAY:
      constructor, constructor_arguments, state, _ = arguments
      if constructor is not _Named.RECONSTRUCT:
        raise _Refused("it holds arrays of JAX that are not made of NumPy's")
      array = _construct(constructor, constructor_arguments)
      _set_state(array, state)
      return array
    case _Named.FROZEN_DICT:
      (content,) = arguments
      return content
  raise _Refused("it calls something that is not a constructor of arrays")


def _set_state(target: Any, state: Any) -> None:
  match target:
    case _Dtype():
      if state[1] not in ("<", "|", "="):
        raise _Refused("its arrays are big-endian")
    case _Array():
      _, shape, dtype, is_fortran, data = state
      target.content = _content(dtype, shape, data, "F" if is_fortran else "C")
    case _:
      raise _Refused("it sets the state of something other than an array")


def _content(dtype: Any, shape: Any, data: Any, order: Any) -> np.ndarray:
  if (
    not isinstance(dtype, _Dtype)
    or not isinstance(data, bytes | bytearray)
    or not isinstance(shape, tuple)
    or not all(type(size) is int and size >= 0 for size in shape)
    or math.prod(shape) * dtype.dtype.itemsize != len(data)
    or order not in ("C", "F")
  ):
    raise _Refused("the content of an array does not fit its shape and type")
  return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _flat(tree: Any) -> dict[str, np.ndarray]:
  """The arrays of nested dictionaries, each of which is nested in one place only."""
  arrays: dict[str, np.ndarray] = {}
  seen: set[int] = set()
  pending: list[tuple[tuple[str, ...], Any]] = [((), tree)]
  while pending:
    keys, node = pending.pop()
    if isinstance(node, dict):
      if id(node) in seen or len(keys) == _MOST_LEVELS:
        raise _Refused("its dictionaries are nested in themselves, in several places or too deep")
      seen.add(id(node))
      pending += [((*keys, key), value) for key, value in node.items()]
    elif isinstance(node, _Array) and node.content is not None and keys:
      arrays["/".join(keys)] = node.content
    else:
      raise _Refused(f"its {_short('/'.join(keys))} is neither a dictionary nor an array")
  return arrays


def _short(name: str) -> str:
  """The name on one line, whatever the pickle has made of it."""
  return repr(name[:100])
