"""Runs the Triton kernels of this repository on NumPy arrays, in Triton's interpreter.

Import this before anything imports Triton: kernels choose the interpreter when they are defined.
"""

import os
import threading

os.environ["TRITON_INTERPRET"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

interpreter = pytest.importorskip("triton.runtime.interpreter", exc_type=ImportError)

# Everything that defines kernels. The variable is then unset: programs that tests start compile.
import jax_triton

from kernels.attention.triton import backward, forward
from kernels.decode.triton import kernel as decode_kernel
from kernels.experts.triton import kernel as experts_kernel

del os.environ["TRITON_INTERPRET"]

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "int8": "i8"}
ARRAY = (jax.Array, np.ndarray)
# Each device calls from its own thread.
_ONE_AT_A_TIME = threading.Lock()


class Pointer:
  """The attributes of an array argument that the interpreter uses."""

  def __init__(self, array):
    self.array = np.asarray(array)
    self.dtype = DTYPES[str(array.dtype)]

  def data_ptr(self):
    return self.array.ctypes.data


class Grid(interpreter.GridExecutor):
  """The interpreter's loop over programs, without its copies of (PyTorch) arrays to the host."""

  def _init_args_hst(self, args, kwargs):
    return args, kwargs

  def _restore_args_dev(self, *_):
    pass


def triton_call(*args, kernel, out_type, grid, num_warps, num_stages, backend_options, **constants):
  """Replaces `jax_triton.triton_call`. Outputs start as NaN, which shows what is not written."""
  flat_types, tree = jax.tree.flatten(out_type)
  arrays = [arg for arg in args if isinstance(arg, ARRAY)]

  def run(*arrays):
    arrays = iter(arrays)
    inputs = [Pointer(next(arrays)) if isinstance(arg, ARRAY) else arg for arg in args]
    outputs = [Pointer(np.full(kind.shape, np.nan, kind.dtype)) for kind in flat_types]
    with _ONE_AT_A_TIME:
      Grid(kernel.rewrite(), kernel.arg_names, grid)(*inputs, *outputs, **constants)
    return [output.array for output in outputs]

  if any(isinstance(array, jax.core.Tracer) for array in arrays):
    return tree.unflatten(jax.pure_callback(run, flat_types, *arrays))
  return tree.unflatten([jnp.asarray(output) for output in run(*arrays)])


_create_dot = interpreter.InterpreterBuilder.create_dot


def create_dot(self, left, right, *args):
  """The interpreter keeps bfloat16 as uint16, and multiplies these bits: decode them first."""

  def decode(operand):
    if operand.dtype.scalar != interpreter.tl.bfloat16:
      return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

  return _create_dot(self, decode(left), decode(right), *args)


interpreter.InterpreterBuilder.create_dot = create_dot


_create_si_to_fp = interpreter.InterpreterBuilder.create_si_to_fp


def create_si_to_fp(self, source, type_):
  """The interpreter gives bfloat16 the integer's bits: go by float32."""
  if type_.scalar != interpreter.tl.bfloat16:
    return _create_si_to_fp(self, source, type_)
  exact = _create_si_to_fp(self, source, source.dtype.with_element_ty(interpreter.tl.float32))
  return self.create_fp_trunc(exact, type_)


interpreter.InterpreterBuilder.create_si_to_fp = create_si_to_fp
