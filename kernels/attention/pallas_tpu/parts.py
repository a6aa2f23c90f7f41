"""What the TPU kernels of attention and decode share: devices, blocks, copies, scores and masks.

Kernels compute scores keys first, [k, R], with the rows of a query tile on the lanes.

T rows of tiles, R rows per tile, k keys per block, D head_dim.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.block_tables import FIRST, FULL_FIRST, FULL_STOP, STOP
from kernels.attention.pallas_tpu.block_sizes import vmem_bytes
from kernels.attention.pallas_tpu.tiles import Tiling

LOG2_E = math.log2(math.e)
# Below every score, and finite because -inf - -inf is NaN. A row that sees no key keeps a sum of 0.
LOWEST = float(jnp.finfo(jnp.float32).min)


def device() -> Any:
  """The device that the program will run on: of the mesh (also ahead of time), or the default."""
  return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def num_cores() -> int:
  """TensorCores per device: two on TPU v4 and v5p. Other platforms do not report a number."""
  return getattr(device(), "num_cores", None) or 1


def compiler_params() -> pltpu.CompilerParams:
  """Compiler parameters for a grid of (independent rows, steps of `stream`)."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes(device().device_kind)
  )


class KeyWalk:
  """The key blocks that the query tile of each step visits; a `stream.Walk`."""

  def __init__(self, spans_ref: jax.Ref, core: jax.Array, cores: int):
    self.spans_ref, self.core, self.cores = spans_ref, core, cores

  def field(self, step: jax.Array, field: int) -> jax.Array:
    return self.spans_ref[0, 0, 4 * (step * self.cores + self.core) + field]

  def first(self, step: jax.Array) -> jax.Array:
    return self.field(step, FIRST)

  def following(self, step: jax.Array, index: jax.Array) -> jax.Array:
    return index + 1

  def stop(self, step: jax.Array) -> jax.Array:
    return self.field(step, STOP)

  def is_full(self, step: jax.Array, index: jax.Array) -> jax.Array:
    return (self.field(step, FULL_FIRST) <= index) & (index < self.field(step, FULL_STOP))


class TileSpecs:
  """Block specifications of the arrays that belong to a grid step (row of T, step)."""

  def __init__(self, tiling: Tiling, rows_per_batch: int):
    self.cores, self.rows_per_batch = tiling.cores, rows_per_batch
    self.rows = tiling.rows

  def table(self, table_Bx1xL: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(
      (1, 1, table_Bx1xL.shape[2]),
      lambda row, step: (self._batch(row), 0, 0),
      memory_space=pltpu.SMEM,
    )

  def intervals(self) -> pl.BlockSpec:
    return pl.BlockSpec(
      (1, 1, 2, self.rows), lambda row, step: (self._batch(row), self.tile(row, step), 0, 0)
    )

  def query(self, *shape: int) -> pl.BlockSpec:
    return pl.BlockSpec(
      (1, 1, *shape), lambda row, step: (row // self.cores, self.tile(row, step), 0, 0)
    )

  def tile(self, row: jax.Array, step: jax.Array) -> jax.Array:
    return step * self.cores + row % self.cores

  def _batch(self, row):
    return row // (self.cores * self.rows_per_batch)


def key_copies(
  sources: Sequence[jax.Ref],
  buffers: Sequence[jax.Ref],
  semaphores: jax.Ref,
  row: jax.Array,
  index: jax.Array,
  slot: jax.Array,
) -> list:
  """The copies of block `index` in a row of each source to buffer `slot`."""
  return [
    pltpu.make_async_copy(source.at[row, index], buffer.at[slot], semaphores.at[number, slot])
    for number, (source, buffer) in enumerate(zip(sources, buffers))
  ]


def scores(
  key_kxD: jax.Array, query_RxD: jax.Array, scale: float, soft_cap: float | None
) -> tuple[jax.Array, jax.Array | None]:
  """Scores [k, R] in units of log 2, and the tanh of the soft cap (or None)."""
  return base_2(dot(key_kxD, query_RxD, (1, 1)), scale, soft_cap)


def base_2(
  products: jax.Array, scale: jax.Array | float, soft_cap: float | None
) -> tuple[jax.Array, jax.Array | None]:
  """Scores in units of log 2, and the tanh of the soft cap (or None)."""
  if soft_cap is None:
    return products * (scale * LOG2_E), None
  tanh = jnp.tanh(products * (scale / soft_cap))
  return tanh * (soft_cap * LOG2_E), tanh


def normalised(
  sum_out: jax.Array, maximum: jax.Array, weight_sum: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """out and log_sum_exp, from the sums of exp2(score - maximum) * value and exp2(score - maximum).

  `maximum` is in units of log 2. Rows with a sum of 0 are empty.
  """
  is_empty = weight_sum == 0
  weight_sum = jnp.where(is_empty, 1.0, weight_sum)
  log_sum_exp = jnp.where(is_empty, -jnp.inf, maximum / LOG2_E + jnp.log(weight_sum))
  return sum_out * (1.0 / weight_sum), log_sum_exp


def mask(intervals_2xR: jax.Array, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Which keys of block `index` each row sees, bool [k, R]."""
  start_1xR = intervals_2xR[0:1] - index * shape[0]
  stop_1xR = intervals_2xR[1:2] - index * shape[0]
  key_kxR = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return (key_kxR >= start_1xR) & (key_kxR < stop_1xR)


def dot(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """A product accumulated in float32; float32 operands are not rounded to bfloat16."""
  precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(
    left, right, dimensions, precision=precision, preferred_element_type=jnp.float32
  )


def varying(shape: tuple[int, ...], dtype: jnp.dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
  """The type of an output that varies over the same mesh axes as `like`, for `jax.shard_map`."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
