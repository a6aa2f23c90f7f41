"""The decode kernel for TPU: streams the blocks of the cache that meet an interval from HBM.

Each block is loaded once for all query heads; `layouts` says what a block looks like. If a device
has two TensorCores, they take blocks in turn, and the caller merges their results.

L layers, B batch, K cached positions, G key/value heads, D head_dim, R rows of queries, k positions
per block, c columns of scores, C cores.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.block_tables import FIRST, FULL_FIRST, FULL_STOP, STOP
from kernels.attention.pallas_tpu import parts
from kernels.attention.pallas_tpu.parts import LOWEST, base_2, dot, normalised, varying
from kernels.attention.pallas_tpu.stream import stream
from kernels.decode.cache import STRETCH, Cached, Quantized
from kernels.decode.pallas_tpu.layouts import Heads, Rows


def partial(
  query_BxRxD: jax.Array,
  keys: Cached,
  values: Cached,
  facts_BxRx3: jax.Array,
  table: jax.Array,
  *,
  layout: Rows | Heads,
  positions: int,
  length: int,
  scale: float,
  soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Attends to each core's share of the blocks.

  Args:
    query_BxRxD: rows in the order of `layout.query_rows`.
    keys: all layers, as `layouts.view` returns them.
    values: likewise.
    facts_BxRx3: int32; start, stop and key/value head of each row.
    table: int32 [B * 4 + 1]; the block table of each batch row, then the layer.
    layout: the layout of keys and values.
    positions: k.
    length: K.
    scale: the factor of the scores.
    soft_cap: as in `attention`.

  Returns:
    (out [C, B, R, D], log_sum_exp [C, B, R, 1]), both float32.
  """
  B, R, D = query_BxRxD.shape
  k, cores = positions, parts.num_cores()

  def rows(width):
    return pl.BlockSpec((1, R, width), lambda core, row: (row, 0, 0))

  def result(width):
    return pl.BlockSpec((1, 1, R, width), lambda core, row: (core, row, 0, 0))

  def in_place(cached):
    return jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), cached)

  def buffers(cached):
    if isinstance(cached, Quantized):
      scales = pltpu.VMEM((2, layout.num_key_heads, k), jnp.float32)
      return Quantized(buffers(cached.value), scales)
    return pltpu.VMEM((2, *layout.block_shape(k)), cached.dtype)

  return pl.pallas_call(
    functools.partial(
      _kernel, layout=layout, positions=k, length=length, scale=scale, soft_cap=soft_cap
    ),
    grid=(cores, B),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      rows(D),
      rows(3),
      in_place(keys),
      in_place(values),
    ],
    out_specs=[result(D), result(1)],
    out_shape=[
      varying((cores, B, R, D), jnp.float32, query_BxRxD),
      varying((cores, B, R, 1), jnp.float32, query_BxRxD),
    ],
    scratch_shapes=[
      buffers(keys),
      buffers(values),
      pltpu.VMEM((R, D), jnp.float32),
      pltpu.VMEM((R, 1), jnp.float32),
      pltpu.VMEM((R, 1), jnp.float32),
      pltpu.SemaphoreType.DMA((4, 2)),
      pltpu.SMEM((1,), jnp.int32),
    ],
    compiler_params=parts.compiler_params(),
    name="attention_decode",
  )(table, query_BxRxD, facts_BxRx3, keys, values)


class BlockWalk:
  """The blocks that a core visits in each batch row; block i of row b has index b * num_blocks + i.

  It is a `stream.Walk` whose steps are the batch rows.
  """

  def __init__(self, table_ref: jax.Ref, num_blocks: int, core: jax.Array, cores: jax.Array | int):
    self.table_ref, self.num_blocks, self.core, self.cores = table_ref, num_blocks, core, cores

  def field(self, row: jax.Array, field: int) -> jax.Array:
    return row * self.num_blocks + self.table_ref[4 * row + field]

  def first(self, row: jax.Array) -> jax.Array:
    return self.field(row, FIRST) + self.core

  def following(self, row: jax.Array, index: jax.Array) -> jax.Array:
    return index + self.cores

  def stop(self, row: jax.Array) -> jax.Array:
    return self.field(row, STOP)

  def is_full(self, row: jax.Array, index: jax.Array) -> jax.Array:
    return (self.field(row, FULL_FIRST) <= index) & (index < self.field(row, FULL_STOP))


def _kernel(
  table_ref,
  query_ref,
  facts_ref,
  keys_hbm_ref,
  values_hbm_ref,
  out_ref,
  log_sum_exp_ref,
  keys_ref,
  values_ref,
  sum_out_ref,
  maximum_ref,
  sum_ref,
  semaphores,
  count_ref,
  *,
  layout: Rows | Heads,
  positions: int,
  length: int,
  scale: float,
  soft_cap: float | None,
):
  k, K, num_blocks = positions, length, pl.cdiv(length, positions)
  layer = table_ref[table_ref.shape[0] - 1]
  walk = BlockWalk(table_ref, num_blocks, pl.program_id(0), pl.num_programs(0))
  pieces = layout.pieces(query_ref.shape[1], k)
  sum_out_ref[...] = jnp.zeros_like(sum_out_ref)
  maximum_ref[...] = jnp.full_like(maximum_ref, LOWEST)
  sum_ref[...] = jnp.zeros_like(sum_ref)

  def begin_of(index):
    # If K is not a multiple of k, the last block of a row starts earlier, to stay in bounds.
    return pl.multiple_of(jnp.minimum(index % num_blocks * k, K - k), STRETCH)

  def copies(index, slot):
    row, begin = index // num_blocks, begin_of(index)
    pairs = []
    for source, buffer in ((keys_hbm_ref, keys_ref), (values_hbm_ref, values_ref)):
      if isinstance(source, Quantized):
        pairs.append((source.scale.at[layer, row, :, pl.ds(begin, k)], buffer.scale))
        source, buffer = source.value, buffer.value
      pairs.append((source.at[(layer, row, *layout.block_index(begin, k))], buffer))
    return [
      pltpu.make_async_copy(source, buffer.at[slot], semaphores.at[number, slot])
      for number, (source, buffer) in enumerate(pairs)
    ]

  def load(ref, slot, piece):
    """Cached numbers in the query's dtype, and the scale of each column, [1, c] or 1."""
    if isinstance(ref, Quantized):
      numbers = layout.numbers(ref.value, slot, piece).astype(query_ref.dtype)
      return numbers, layout.scales(ref.scale, slot, piece)
    return layout.numbers(ref, slot, piece), 1.0

  def piece_scores(piece, index, slot, is_masked):
    key, key_scale_1xc = load(keys_ref, slot, piece)
    products_Rxc = dot(query_ref[0, piece.rows], key, layout.key_axes)
    scores_Rxc, _ = base_2(products_Rxc, scale * key_scale_1xc, soft_cap)
    start_Rx1, stop_Rx1, head_Rx1 = (facts_ref[0, piece.rows, fact : fact + 1] for fact in range(3))
    column_Rxc = jax.lax.broadcasted_iota(jnp.int32, scores_Rxc.shape, 1) + piece.columns.start
    is_own_Rxc = layout.is_own(column_Rxc, head_Rx1)
    if is_own_Rxc is not None:
      scores_Rxc = jnp.where(is_own_Rxc, scores_Rxc, -jnp.inf)
    if is_masked:
      position_Rxc = begin_of(index) + layout.position(column_Rxc)
      lower_Rx1 = jnp.maximum(start_Rx1, index % num_blocks * k)
      is_seen_Rxc = (position_Rxc >= lower_Rx1) & (position_Rxc < stop_Rx1)
      scores_Rxc = jnp.where(is_seen_Rxc, scores_Rxc, -jnp.inf)
    return scores_Rxc

  def add(index, slot, is_masked):
    next_scores_Rxc = piece_scores(pieces[0], index, slot, is_masked)
    for piece, next_piece in zip(pieces, [*pieces[1:], None]):
      scores_Rxc, rows = next_scores_Rxc, piece.rows
      # The scores of the next piece come first, so that matrix and vector units work in parallel.
      if next_piece is not None:
        next_scores_Rxc = piece_scores(next_piece, index, slot, is_masked)
      old_maximum_Rx1 = maximum_ref[rows]
      maximum_Rx1 = jnp.maximum(old_maximum_Rx1, jnp.max(scores_Rxc, axis=1, keepdims=True))
      weights_Rxc = jnp.exp2(scores_Rxc - maximum_Rx1)
      decay_Rx1 = jnp.exp2(old_maximum_Rx1 - maximum_Rx1)
      maximum_ref[rows] = maximum_Rx1
      sum_ref[rows] = decay_Rx1 * sum_ref[rows] + jnp.sum(weights_Rxc, axis=1, keepdims=True)
      value, value_scale_1xc = load(values_ref, slot, piece)
      weights_Rxc = (weights_Rxc * value_scale_1xc).astype(value.dtype)
      out_RxD = dot(weights_Rxc, value, layout.value_axes)
      sum_out_ref[rows] = decay_Rx1 * sum_out_ref[rows] + out_RxD

  stream(walk, copies, add, count_ref)
  out_ref[0, 0], log_sum_exp_ref[0, 0] = normalised(
    sum_out_ref[...], maximum_ref[...], sum_ref[...]
  )
