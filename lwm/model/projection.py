"""Projections: what the weights of a layer's linear maps are, and the products with them.

The seven linear maps of a block and the head all go through this file. A layer declares its
projections once, gathers their weights for use, passes them into `jax.shard_map` and multiplies:

    QUERY = Projection("query", ("model", "heads", "head_dim"))
    QUERY.declare(layer, config, (M, H, D), std, num_layers, rngs)          # in the constructor
    weights = QUERY.gather(layer, x.dtype)                                  # before jax.shard_map
    product("bsm,mhd->bshd", x, weights)                                    # inside, in_specs:
    QUERY.specs(layer)

`Weights` is a tree, so only this file must know other kinds of weights.

With `ShardingRules.stationary`, `gather` gathers nothing: each device multiplies with the shard of
the weights that it stores, and `product` sums or joins the results (Pope et al., arXiv 2211.05102,
section 3.2). Then a step of generation reads each weight once, on one device.

L layers of a stretch, N head groups, R rank of a low-rank addition.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lwm.config.model import ModelConfig
from lwm.model import lora, quantised
from lwm.model.parameters import matrix, zeros
from lwm.model.quantised import QuantizedKernel
from lwm.parallel.sharding import LogicalAxes, ShardingRules

# A parameter of a projection and its logical axes, without the axis of layers.
_Part = tuple[nnx.Param, LogicalAxes]


class Weights(NamedTuple):
  """The weights of a projection in use, or their partitions.

  Attributes:
    kernel: [inputs..., outputs...], or a `QuantizedKernel`.
    bias: [outputs...], or None.
    a: [inputs..., R], already scaled, or None; `a` and `b` add `a b` to the kernel (LoRA).
    b: [R, outputs...], or None.
  """

  kernel: Any
  bias: Any = None
  a: Any = None
  b: Any = None

  def output_group(self, index: jax.Array, groups: int) -> "Weights":
    """The weights of one of N equal groups along the first output axis; one input axis."""
    if groups == 1:
      return self

    def part(array: jax.Array | None, axis: int) -> jax.Array | None:
      if array is None:
        return None
      size = array.shape[axis] // groups
      return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)

    return Weights(part(self.kernel, 1), part(self.bias, 0), self.a, part(self.b, 1))

  def split_inputs(self, groups: int) -> "Weights":
    """The same weights with the first input axis split in two, of which the first has size N."""

    def split(array: jax.Array | None) -> jax.Array | None:
      return None if array is None else array.reshape(groups, -1, *array.shape[1:])

    kernel = self.kernel
    if isinstance(kernel, Stationary):
      part = Weights(kernel.part).split_inputs(groups).kernel
      kernel = dataclasses.replace(kernel, part=part)
    elif not isinstance(kernel, QuantizedKernel):  # A quantized kernel has one axis of inputs.
      kernel = split(kernel)
    return self._replace(kernel=kernel, a=split(self.a))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stationary:
  """The shard along `model` of a kernel that stays where it is stored, or its partitions.

  Attributes:
    part: as `Weights.kernel`.
    axes: the mesh axes that `model` is divided over.
    inputs: whether `model` is the kernel's inputs; if not, it is the last axis of its outputs.
  """

  part: Any
  axes: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))
  inputs: bool = dataclasses.field(metadata=dict(static=True))


@dataclasses.dataclass(frozen=True)
class Projection:
  """One linear map of a layer.

  Attributes:
    name: of the kernel's parameter, an attribute of the layer. The bias is `NAME_bias`, and a
      low-rank addition `NAME_lora_a` and `NAME_lora_b`.
    axes: logical axes of the kernel, inputs first, without the axis of layers.
    num_inputs: how many of these axes are inputs.
  """

  name: str
  axes: LogicalAxes
  num_inputs: int = 1

  def declare(
    self,
    layer: Any,
    config: ModelConfig,
    shape: tuple[int, ...],
    standard_deviation: float,
    num_layers: int,
    rngs: nnx.Rngs,
    bias: bool = False,
  ) -> None:
    """Sets the parameters as attributes of `layer`, which has `rules`.

    Args:
      layer: the module that has the projection.
      config: whether there is a low-rank addition.
      shape: of the kernel, without the axis of layers.
      standard_deviation: of the kernel's initial distribution; biases and B are 0, and A has the
        standard deviation that keeps the scale of its inputs.
      num_layers: length of the leading axis of layers.
      rngs: see `matrix`.
      bias: whether there is one.
    """
    L, rules, n = num_layers, layer.rules, self.num_inputs
    axes = ("layers", *self.axes)
    setattr(layer, self.name, matrix(rngs, rules, (L, *shape), axes, standard_deviation))
    outputs = ("layers", *self.axes[n:])
    if bias:
      setattr(layer, f"{self.name}_bias", zeros(rules, (L, *shape[n:]), outputs))
    if config.lora and self.name in config.lora.targets:
      R, num_inputs = config.lora.rank, math.prod(shape[:n])
      a_axes, b_axes = ("layers", *self.axes[:n], None), ("layers", None, *self.axes[n:])
      a = matrix(rngs, rules, (L, *shape[:n], R), a_axes, num_inputs**-0.5)
      setattr(layer, self.name + lora.A, a)
      setattr(layer, self.name + lora.B, zeros(rules, (L, R, *shape[n:]), b_axes))
      layer.lora_scale = config.lora.scale

  def gather(self, layer: Any, dtype: DTypeLike, whole: bool = False) -> Weights:
    """The weights in `dtype`, whole along `model` (see `ShardingRules.gather`) or stationary."""
    stationary = is_stationary(layer.rules)

    def gathered(part: _Part | None, scale: float = 1.0) -> Any:
      if part is None:
        return None
      parameter, axes = part
      value = parameter.get_value()
      if stationary:
        is_quantized = isinstance(value, QuantizedKernel)
        return value if is_quantized else (value * scale).astype(dtype)
      if isinstance(value, QuantizedKernel):
        return value.gather(layer.rules, *self._divided)
      return layer.rules.gather(value if scale == 1 else scale * value, dtype, *axes, whole=whole)

    kernel, bias, a, b = self._parts(layer)
    scale = layer.lora_scale if a else 1.0
    own = Weights(gathered(kernel), gathered(bias), gathered(a, scale), gathered(b))
    return self._as_stationary(layer.rules, own) if stationary else own

  def specs(self, layer: Any) -> Weights:
    """The partitions of what `gather` returns."""
    stationary = is_stationary(layer.rules)

    def partition(part: _Part | None) -> Any:
      if part is None:
        return None
      parameter, axes = part
      value = parameter.get_value()
      if isinstance(value, QuantizedKernel):
        return value.specs(layer.rules, *self._divided, whole=not stationary)
      return layer.rules.spec(*axes) if stationary else layer.rules.gathered(*axes)

    own = Weights(*map(partition, self._parts(layer)))
    return self._as_stationary(layer.rules, own) if stationary else own

  def _as_stationary(self, rules: ShardingRules, weights: Weights) -> Weights:
    inputs = "model" in self.axes[: self.num_inputs]
    return weights._replace(kernel=Stationary(weights.kernel, rules.model, inputs))

  @property
  def _divided(self) -> tuple[str | None, str | None]:
    """The first axes of inputs and of outputs; only these may be divided over devices."""
    return self.axes[0], self.axes[self.num_inputs]

  def _parts(self, layer: Any) -> list[_Part | None]:
    """The parameters of a layer in the order of `Weights`, with their logical axes."""
    inputs, outputs = self.axes[: self.num_inputs], self.axes[self.num_inputs :]
    parts = (
      ("", self.axes),
      ("_bias", outputs),
      (lora.A, (*inputs, None)),
      (lora.B, (None, *outputs)),
    )
    found = [(getattr(layer, self.name + suffix, None), axes) for suffix, axes in parts]
    return [None if parameter is None else (parameter, axes) for parameter, axes in found]


def product(
  equation: str, x: jax.Array, weights: Weights, dtype: DTypeLike | None = None
) -> jax.Array:
  """The projection of x.

  Args:
    equation: of `jnp.einsum`, for x and the kernel. The kernel's outputs are the last axes of the
      result, in the same order. The letter r is reserved for the rank.
    x: in the dtype of the weights.
    weights: as gathered, or parts of them.
    dtype: of the result; default: that of x.
  """
  if isinstance(weights.kernel, Stationary):
    return _stationary_product(equation, x, weights, dtype or x.dtype)
  if isinstance(weights.kernel, QuantizedKernel):
    out = quantised.product(equation, x, weights.kernel, dtype)
  else:
    out = jnp.einsum(equation, x, weights.kernel, preferred_element_type=dtype)
  if weights.a is not None:
    operands, result = equation.split("->")
    given, kernel = operands.split(",")
    inputs = "".join(axis for axis in kernel if axis not in result)
    outputs = kernel.removeprefix(inputs)
    low = result.removesuffix(outputs) + "r"
    narrow = jnp.einsum(f"{given},{inputs}r->{low}", x, weights.a)
    out += jnp.einsum(f"{low},r{outputs}->{result}", narrow, weights.b)
  if weights.bias is not None:
    out += jnp.expand_dims(weights.bias, range(out.ndim - weights.bias.ndim))
  return out


def is_stationary(rules: ShardingRules) -> bool:
  """Whether weights stay where they are stored: the rules say so, and they are divided at all."""
  mesh = jax.sharding.get_abstract_mesh().shape
  return rules.stationary and any(mesh[axis] > 1 for axis in rules.model)


def _stationary_product(
  equation: str, x: jax.Array, weights: Weights, dtype: DTypeLike
) -> jax.Array:
  """`product` with a `Stationary` kernel; sums over devices are float32."""
  kernel = weights.kernel
  own = weights._replace(kernel=kernel.part, bias=None)
  if kernel.inputs:
    size = x.shape[-1] // jax.lax.axis_size(kernel.axes)
    first = jax.lax.axis_index(kernel.axes) * size
    x = jax.lax.dynamic_slice_in_dim(x, first, size, axis=-1)
    out = jax.lax.psum(product(equation, x, own, jnp.float32), kernel.axes)
  else:
    out = join_width(product(equation, x, own, jnp.float32), kernel.axes)
  if weights.bias is not None:
    out += jnp.expand_dims(weights.bias, range(out.ndim - weights.bias.ndim))
  return out.astype(dtype)


def join_width(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Concatenates the last axis over devices, each of which has a part of it."""
  return jax.lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True, to="invarying")
