"""Loads parameters for sampling, in the form that is asked for: floats, or codes of 8 or 4 bits."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kernels.quantised_matmul import GRIDS, Grid, QuantizedMatrix, quantize
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.errors import UserError
from lwm.model import Model, quantised
from lwm.model.quantised import QuantizedKernel
from lwm.parallel.sharding import LogicalAxes

# The forms of weights; those of GRIDS are quantized.
FORMS = ("float32", "bfloat16", *GRIDS)
# The embedding and the head have the most effect on the logits, so they keep 8 bits.
_TABLE_GRIDS = {4: GRIDS["int8_32"]}
_TABLES = (quantised.EMBEDDING, "output")
# Names of the parameters that are not always float32.
_MATRICES = (quantised.EMBEDDING, *quantised.INPUT_AXES)

# (path, layer or None) -> an array, or one layer of it.
Read = Callable[[str, int | None], np.ndarray]


def load_params(stored: StoredCheckpoint, model: Model, form: str) -> Any:
  """The parameters of a checkpoint, sharded by the model's rules over the mesh that is set.

  Norms, biases, low-rank additions and adapters are float32 in every form.

  Quantized parameters are read one layer at a time, so that host memory holds the codes of one
  parameter and the floats of one layer, whatever the model.

  Args:
    stored: the checkpoint.
    model: the model of the checkpoint.
    form: one of FORMS.

  Raises:
    UserError: the groups of a matrix do not divide over the mesh.
  """
  if form not in GRIDS:
    return stored.params(abstract_params(model, form, jax.sharding.get_mesh()))
  reader = stored.reader()
  return quantized_params(
    model, lambda path, layer: reader.read(path, () if layer is None else (layer,)), GRIDS[form]
  )


def abstract_params(model: Model, form: str, mesh: jax.sharding.Mesh) -> Any:
  """Shapes, dtypes and shardings of the parameters in a form that is not quantized."""
  shardings = model.rules.tree_shardings(model.logical_axes, mesh)

  def abstract(keys, leaf, sharding):
    dtype = form if keys[-1].key in _MATRICES else "float32"
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=sharding)

  return jax.tree.map_with_path(abstract, model.abstract(), shardings)


def quantized_params(model: Model, read: Read, grid: Grid) -> Any:
  """Parameters with quantized kernels, embedding and head; norms and biases stay float32.

  Args:
    model: its rules and the mesh that is set divide the parameters.
    read: the float parameters. Tables may have more or fewer ids than the model, as in
      `StoredCheckpoint.params`.
    grid: of the kernels. With 4 bits, the embedding and the head are on the grid "int8_32".

  Raises:
    UserError: the groups of a matrix do not divide over the mesh.
  """
  axes = traverse_util.flatten_dict(model.logical_axes, sep=".")
  params: dict[str, Any] = {}
  for path, leaf in traverse_util.flatten_dict(model.abstract(), sep=".").items():
    name = path.rpartition(".")[2]
    if name in _TABLES:
      own_grid = _TABLE_GRIDS.get(grid.bits, grid)
      whole = _fit(read(path, None), leaf.shape)
      params[path] = _kernel(model, path, axes[path], own_grid, [whole])
    elif name in quantised.INPUT_AXES:
      layers = (read(path, layer) for layer in range(leaf.shape[0]))
      params[path] = _kernel(model, path, axes[path][1:], grid, layers)
    else:
      params[path] = _place(read(path, None).astype(np.float32), model.rules.spec(*axes[path]))
  return traverse_util.unflatten_dict(params, sep=".")


def num_bytes(params: Any) -> int:
  """The memory of parameters, over all devices that hold different parts of them."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _kernel(
  model: Model, path: str, axes: LogicalAxes, grid: Grid, layers: Iterable[np.ndarray]
) -> QuantizedKernel:
  """A quantized parameter on the devices.

  Args:
    model: its rules say which device holds what.
    path: of the parameter.
    axes: its logical axes, without the axis of layers.
    grid: to round to.
    layers: its floats, layer by layer.
  """
  name = path.rpartition(".")[2]
  specs = quantised.partitions(model.rules, grid, *quantised.matrix_axes(name, axes))
  matrices = []
  for layer in layers:
    matrix_KxN, trailing = quantised.as_matrix(name, layer)
    _check_division(path, matrix_KxN.shape, grid, specs.codes)
    matrices.append(quantize(matrix_KxN, grid))
  stacked = QuantizedMatrix(grid, *(np.stack(arrays) for arrays in zip(*matrices)))
  matrix = jax.tree.map(_place, stacked, specs)
  return QuantizedKernel(matrix, trailing=trailing)


def _check_division(path: str, shape: tuple[int, ...], grid: Grid, spec: jax.P) -> None:
  """Raises UserError unless outputs and whole groups of inputs divide evenly over devices."""
  mesh = jax.sharding.get_mesh().shape
  units = (grid.group or 1, f"inputs in groups of {grid.group}"), (1, "outputs")
  for size, axes, (unit, what) in zip(shape, spec[1:], units):
    names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    devices = math.prod(mesh[name] for name in names)
    if size % (unit * devices):
      raise UserError(
        f"{path}: {size} {what} do not divide over {devices} devices: choose another form of "
        "weights, or a mesh with fewer devices along "
        f"{' x '.join(names) or 'no axis'}."
      )


def _fit(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The table, padded with zeros or cut at the end of each axis."""
  cut = table[tuple(slice(size) for size in shape)]
  return np.pad(cut, [(0, size - have) for size, have in zip(shape, cut.shape)])


def _place(array: np.ndarray, spec: jax.P) -> jax.Array:
  """The array on the devices of the mesh that is set; each process needs only its own shards."""
  sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
