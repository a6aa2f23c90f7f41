"""Projections: what the weights of a layer's linear maps are, and the products with them.

The seven linear maps of a block and the head all go through this file. A layer declares its
projections once, gathers their weights for use, passes them into `jax.shard_map` and multiplies:

    QUERY = Projection("query", ("model", "heads", "head_dim"))
    QUERY.declare(layer, (M, H, D), std, num_layers, rngs)                  # in the constructor
    weights = QUERY.gather(layer, x.dtype)                                  # before jax.shard_map
    product("bsm,mhd->bshd", x, weights)                                    # inside, in_specs:
    QUERY.specs(layer)

`Weights` is a tree, so only this file must know another kind of weights.

L layers of a stretch, N head groups.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lwm.model.parameters import constant, matrix
from lwm.parallel.sharding import LogicalAxes


class Weights(NamedTuple):
  """The weights of a projection in use, or their partitions.

  Attributes:
    kernel: [inputs..., outputs...].
    bias: [outputs...], or None.
  """

  kernel: Any
  bias: Any = None

  def output_group(self, index: jax.Array, groups: int) -> "Weights":
    """The weights of one of N equal groups along the first output axis; one input axis."""
    if groups == 1:
      return self

    def slice_axis(array: jax.Array, axis: int) -> jax.Array:
      size = array.shape[axis] // groups
      return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)

    bias = None if self.bias is None else slice_axis(self.bias, 0)
    return Weights(slice_axis(self.kernel, 1), bias)

  def split_inputs(self, groups: int) -> "Weights":
    """The same weights with the first input axis split in two, of which the first has size N."""
    kernel = self.kernel.reshape(groups, -1, *self.kernel.shape[1:])
    return self._replace(kernel=kernel)


@dataclasses.dataclass(frozen=True)
class Projection:
  """One linear map of a layer.

  Attributes:
    name: of the kernel's parameter, an attribute of the layer. The bias is `NAME_bias`.
    axes: logical axes of the kernel, inputs first, without the axis of layers.
    num_inputs: how many of these axes are inputs.
  """

  name: str
  axes: LogicalAxes
  num_inputs: int = 1

  def declare(
    self,
    layer: Any,
    shape: tuple[int, ...],
    standard_deviation: float,
    num_layers: int,
    rngs: nnx.Rngs,
    bias: bool = False,
  ) -> None:
    """Sets the parameters as attributes of `layer`, which has `rules`.

    Args:
      layer: the module that has the projection.
      shape: of the kernel, without the axis of layers.
      standard_deviation: of the kernel's initial distribution; biases are 0.
      num_layers: length of the leading axis of layers.
      rngs: see `matrix`.
      bias: whether there is one.
    """
    kernel = matrix(
      rngs, layer.rules, (num_layers, *shape), ("layers", *self.axes), standard_deviation
    )
    setattr(layer, self.name, kernel)
    if bias:
      bias_shape = (num_layers, *shape[self.num_inputs :])
      axes = ("layers", *self._outputs)
      setattr(layer, f"{self.name}_bias", constant(layer.rules, bias_shape, axes, 0))

  def gather(self, layer: Any, dtype: DTypeLike, whole: bool = False) -> Weights:
    """The weights in `dtype`, whole along `model` (see `ShardingRules.gather`)."""
    bias = self._bias(layer)
    return Weights(
      layer.rules.gather(getattr(layer, self.name)[...], dtype, *self.axes, whole=whole),
      None if bias is None else layer.rules.gather(bias[...], dtype, *self._outputs),
    )

  def specs(self, layer: Any) -> Weights:
    """The partitions of what `gather` returns."""
    bias = self._bias(layer)
    return Weights(
      layer.rules.gathered(*self.axes),
      None if bias is None else layer.rules.gathered(*self._outputs),
    )

  @property
  def _outputs(self) -> LogicalAxes:
    return self.axes[self.num_inputs :]

  def _bias(self, layer: Any) -> nnx.Param | None:
    return getattr(layer, f"{self.name}_bias", None)


def product(
  equation: str, x: jax.Array, weights: Weights, dtype: DTypeLike | None = None
) -> jax.Array:
  """The projection of x.

  Args:
    equation: of `jnp.einsum`, for x and the kernel. The kernel's outputs are the last axes of the
      result, in the same order.
    x: in the dtype of the weights.
    weights: as gathered, or parts of them.
    dtype: of the result; default: that of x.
  """
  out = jnp.einsum(equation, x, weights.kernel, preferred_element_type=dtype)
  if weights.bias is None:
    return out
  return out + jnp.expand_dims(weights.bias, range(out.ndim - weights.bias.ndim))
