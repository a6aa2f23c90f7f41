"""Runs the Triton kernels of this repository on NumPy arrays, by Triton's own interpreter.

Import this before anything imports Triton: the interpreter must be chosen when Triton is loaded.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

interpreter = pytest.importorskip("triton.runtime.interpreter", exc_type=ImportError)

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}


class Pointer:
  """What the interpreter asks of an array argument."""

  def __init__(self, array):
    self.array = np.array(array)
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
  """Stands for `jax_triton.triton_call`; outputs start as NaN, which shows what is not written."""
  inputs = [Pointer(arg) if isinstance(arg, jax.Array) else arg for arg in args]
  flat_types, tree = jax.tree.flatten(out_type)
  outputs = [Pointer(np.full(kind.shape, np.nan, kind.dtype)) for kind in flat_types]
  Grid(kernel.rewrite(), kernel.arg_names, grid)(*inputs, *outputs, **constants)
  return tree.unflatten([jnp.asarray(output.array) for output in outputs])


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
