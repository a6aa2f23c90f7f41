"""FLOPs and bytes of a traced program, for networks whose layers are convolutions.

XLA's cost analysis counts a loop body once; this counts it as often as it runs.
"""

import math
from typing import Any, NamedTuple

from jax.extend.core import jaxprs_in_params


class Work(NamedTuple):
  """What the convolutions and matrix products of a program do.

  Attributes:
    flops: two per multiply-add.
    bytes: of their operands and results.
  """

  flops: float = 0.0
  bytes: float = 0.0


def work(jaxpr: Any) -> Work:
  """The work of a program, `jax.make_jaxpr(function)(...).jaxpr`, on all devices together.

  Of branches, the one with most FLOPs counts. Zeros that the gradient of a strided convolution
  inserts between its inputs are not counted.
  """
  flops = size = 0.0
  for equation in jaxpr.eqns:
    own = _own_flops(equation)
    if own:
      flops += own
      size += sum(
        variable.aval.size * variable.aval.dtype.itemsize
        for variable in (*equation.invars, *equation.outvars)
      )
    inner = [work(sub) for sub in jaxprs_in_params(equation.params)]
    if inner:
      times = 1
      if equation.primitive.name == "scan":
        times = equation.params["length"]
      elif equation.primitive.name == "shard_map":
        # The inner program is that of one device.
        times = equation.params["mesh"].size
      elif equation.primitive.name == "cond":
        inner = [max(inner)]
      flops += times * sum(part.flops for part in inner)
      size += times * sum(part.bytes for part in inner)
  return Work(flops, size)


def _own_flops(equation: Any) -> float:
  if equation.primitive.name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval
    return 2 * equation.outvars[0].aval.size * math.prod(left.shape[axis] for axis in contracted)
  if equation.primitive.name == "conv_general_dilated":
    _, channels, *spatial = equation.params["dimension_numbers"].rhs_spec
    kernel = equation.invars[1].aval.shape
    products = math.prod(kernel[axis] for axis in (channels, *spatial))
    zeros = math.prod(equation.params["lhs_dilation"])
    return 2 * equation.outvars[0].aval.size * products / zeros
  return 0.0
