"""Quantized weights in the model: the codes of a matrix in the place of a parameter's floats.

The seven linear maps of a block, the embedding and the head may be quantized; everything else stays
in floats. There are no gradients. kernels/quantised_matmul has the grids and the product.

A sampler reads every weight once per token. So the codes of all layers stay stacked, and the
product of a layer reads its codes in place; `jax.lax.scan` would copy each layer first.

V vocabulary, M model width, K inputs, N outputs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kernels.quantised_matmul import Grid, QuantizedMatrix, quantised_matmul
from lwm.config.model import PROJECTIONS
from lwm.parallel.sharding import LogicalAxes, ShardingRules

# How many axes of a kernel, without the axis of layers, are inputs; by parameter name.
INPUT_AXES = dict.fromkeys((*PROJECTIONS, "output"), 1) | {"out": 2}
# The embedding [V, M] is stored as the kernel [M, V] that it is when the head is tied to it.
EMBEDDING = "embedding"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
  """The kernel of a projection, or the partitions of its arrays.

  Attributes:
    matrix: all layers, with the input axes flattened to K and the output axes to N.
    layer: int32 scalar, the layer in use. None: the stored parameter, or a matrix of one layer.
    trailing: sizes of the output axes after the first.
  """

  matrix: QuantizedMatrix
  layer: Any = None
  trailing: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))

  def gather(
    self, rules: ShardingRules, inputs: str | None, outputs: str | None
  ) -> "QuantizedKernel":
    """This layer's kernel, whole along `model`; a view of all layers if it is stored whole.

    Args:
      rules: how it is stored.
      inputs: logical axis of the inputs.
      outputs: logical axis of the outputs.
    """
    kernel, mesh = self, jax.sharding.get_abstract_mesh().shape
    if self.layer is not None and any(mesh[axis] > 1 for axis in rules.model):
      # Only this layer is gathered.
      matrix = jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, self.layer, 1), self.matrix
      )
      kernel = dataclasses.replace(self, matrix=matrix, layer=None)
    return jax.tree.map(jax.reshard, kernel, kernel.specs(rules, inputs, outputs))

  def specs(
    self, rules: ShardingRules, inputs: str | None, outputs: str | None, *, whole: bool = True
  ) -> "QuantizedKernel":
    """The partitions of what `gather` returns or, if not `whole`, of the stored kernel."""
    axes = (None if whole and axis == "model" else axis for axis in (inputs, outputs))
    layer = None if self.layer is None else jax.P()
    return dataclasses.replace(self, matrix=partitions(rules, self.matrix.grid, *axes), layer=layer)


def partitions(
  rules: ShardingRules, grid: Grid, inputs: str | None, outputs: str | None
) -> QuantizedMatrix:
  """The partitions of the arrays of a matrix, from the logical axes of inputs and outputs."""
  codes = rules.spec("layers", inputs, outputs)
  scales = rules.spec("layers", inputs if grid.group else None, outputs)
  return QuantizedMatrix(grid, codes, scales, scales if grid.has_minimums else None)


def product(
  equation: str, x: jax.Array, kernel: QuantizedKernel, dtype: DTypeLike | None = None
) -> jax.Array:
  """See `lwm.model.projection.product`."""
  operands, result = equation.split("->")
  given, axes = operands.split(",")
  rows = "".join(axis for axis in result if axis not in axes)
  inputs = "".join(axis for axis in axes if axis not in result)
  x_rows = jnp.einsum(f"{given}->{rows}{inputs}", x)
  x_rows = x_rows.reshape(*x_rows.shape[: len(rows)], -1)
  layer = 0 if kernel.layer is None else kernel.layer
  out = quantised_matmul(x_rows, kernel.matrix, layer=layer)
  return out.reshape(*out.shape[:-1], -1, *kernel.trailing).astype(dtype or x.dtype)


def per_layer(stacked: Any) -> tuple[Any, Callable[[Any], Any]]:
  """Takes quantized kernels out of what `jax.lax.scan` slices.

  Args:
    stacked: the parameters of a stretch of layers.

  Returns:
    What to scan over, and a function from a slice of it to the parameters of that layer.
  """
  leaves, structure = jax.tree.flatten(stacked, is_leaf=_is_kernel)

  def layer(sliced: list[jax.Array]) -> Any:
    own = (
      dataclasses.replace(leaf, layer=part) if _is_kernel(leaf) else part
      for leaf, part in zip(leaves, sliced)
    )
    return jax.tree.unflatten(structure, own)

  scanned = [
    jnp.arange(leaf.matrix.codes.shape[0]) if _is_kernel(leaf) else leaf for leaf in leaves
  ]
  return scanned, layer


def as_matrix(name: str, weight: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
  """One layer of a parameter as a matrix [K, N], and the `trailing` of its `QuantizedKernel`.

  Args:
    name: of the parameter, in INPUT_AXES or EMBEDDING.
    weight: without the axis of layers.
  """
  if name == EMBEDDING:
    return weight.T, ()
  n = INPUT_AXES[name]
  return weight.reshape(math.prod(weight.shape[:n]), -1), weight.shape[n + 1 :]


def matrix_axes(name: str, axes: LogicalAxes) -> tuple[str | None, str | None]:
  """The logical axes of the inputs and outputs of that matrix, from those of the parameter."""
  if name == EMBEDDING:
    return axes[1], axes[0]
  return axes[0], axes[INPUT_AXES[name]]


def _is_kernel(node: Any) -> bool:
  return isinstance(node, QuantizedKernel)
