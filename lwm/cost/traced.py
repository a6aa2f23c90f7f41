"""FLOPs, bytes and transfers of a traced program.

XLA's cost analysis counts a loop body once; this counts it as often as it runs.
"""

import math
from collections.abc import Iterator, Mapping
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


# Bytes that each of n devices sends, as a multiple of the larger of a collective's operand and
# result.
_SENT = {
  "psum": lambda n: 2 * (n - 1) / n,
  "psum_invariant": lambda n: 2 * (n - 1) / n,
  "pmax": lambda n: 2 * (n - 1) / n,
  "all_gather": lambda n: (n - 1) / n,
  "all_gather_invariant": lambda n: (n - 1) / n,
  "reduce_scatter": lambda n: (n - 1) / n,
  "all_to_all": lambda n: (n - 1) / n,
  "ppermute": lambda n: 1.0,
  "reshard": lambda n: (n - 1) / n,
}


class Transfer(NamedTuple):
  """A collective of a program.

  Attributes:
    kind: JAX's name of the operation; "reshard" is a gather along the axes.
    axes: mesh axes, those of one device left out.
    bytes: what each device sends each time.
    times: how often it runs.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: float
  times: int


def transfers(jaxpr: Any, sizes: Mapping[str, int]) -> Iterator[Transfer]:
  """The collectives that a program states.

  A while loop counts as one step. All branches count.

  Args:
    jaxpr: as for `work`.
    sizes: devices along each mesh axis.
  """
  for equation in jaxpr.eqns:
    kind = equation.primitive.name
    if kind in _SENT:
      axes = tuple(axis for axis in _axes(equation) if sizes[axis] > 1)
      if axes:
        largest = max(
          sum(_local_bytes(variable.aval, sizes) for variable in variables)
          for variables in (equation.invars, equation.outvars)
        )
        share = _SENT[kind](math.prod(sizes[axis] for axis in axes))
        yield Transfer(kind, axes, share * largest, 1)
    times = equation.params["length"] if kind == "scan" else 1
    for inner in jaxprs_in_params(equation.params):
      for own in transfers(inner, sizes):
        yield own._replace(times=times * own.times)


def _axes(equation: Any) -> list[str]:
  """The mesh axes along which devices exchange something."""
  if equation.primitive.name == "reshard":
    old, new = (_spec_axes(variable.aval) for variable in (*equation.invars, *equation.outvars))
    return [axis for axis in old if axis not in new]
  axes = equation.params.get("axes", equation.params.get("axis_name"))
  return [axes] if isinstance(axes, str) else [*axes]


def _local_bytes(aval: Any, sizes: Mapping[str, int]) -> float:
  shards = math.prod(sizes[axis] for axis in _spec_axes(aval))
  return aval.size * aval.dtype.itemsize / shards


def _spec_axes(aval: Any) -> list[str]:
  """The mesh axes that divide an array; none inside `jax.shard_map`."""
  entries = (entry for entry in aval.sharding.spec.partitions if entry)
  return [axis for entry in entries for axis in ([entry] if isinstance(entry, str) else entry)]
