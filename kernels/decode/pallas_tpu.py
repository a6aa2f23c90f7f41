"""Decode on TPU v4 and later: one Pallas (Mosaic) kernel over the cache where it lies.

Blocks of positions that meet an interval stream from HBM, each loaded once for all query heads;
what a block looks like is `pallas_tpu_layouts`. Where two TensorCores make a device, they take
turns at the blocks, and their results merge.

L layers, B batch, Q query length, K cached positions, H query heads, G key/value heads, D head_dim,
R rows of queries (Q * H and padding), k positions in a block, c columns of scores, C cores.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import pallas_tpu
from kernels.attention.block_sizes_tpu import DECODE_BLOCK_BYTES, vmem_bytes
from kernels.attention.intervals import KeyIntervals
from kernels.attention.merge import merge
from kernels.attention.pallas_tpu_forward import LOWEST, base_2, by_mask, dot, normalised, varying
from kernels.attention.pallas_tpu_stream import stream
from kernels.decode.backend import Backend
from kernels.decode.cache import STRETCH, Cached, Quantized
from kernels.decode.pallas_tpu_layouts import Heads, Rows, layout_of, view

# Scores of a block: what they take to compute is unrolled, and compiling takes its time. Rather
# than more than the most, XLA.
BLOCK_SCORES = 2**18
MOST_SCORES = 2**21
# Fields of a batch row in the table.
FIRST, STOP, FULL_FIRST, FULL_STOP = range(4)


def partial(
  query_BxQxHxD,
  key_LxBxKxGxD: Cached,
  value_LxBxKxGxD: Cached,
  layer,
  intervals: KeyIntervals,
  *,
  scale: float,
  soft_cap: float | None,
):
  """See `kernels.decode.backend.Partial`."""
  B, Q, H, _ = query_BxQxHxD.shape
  layout, k = layout_of(key_LxBxKxGxD), block_positions(key_LxBxKxGxD, Q, H)
  group_H = jnp.arange(H, dtype=jnp.int32) // (H // layout.num_key_heads)
  facts = (*(bound_BxQ[..., None] for bound_BxQ in intervals), group_H[None, None])
  facts_BxQxHx3 = jnp.stack([jnp.broadcast_to(fact, (B, Q, H)) for fact in facts], axis=3)
  out_CxBxRxD, log_sum_exp_CxBxRx1 = call(
    layout.query_rows(query_BxQxHxD),
    view(key_LxBxKxGxD, layout),
    view(value_LxBxKxGxD, layout),
    layout.query_rows(facts_BxQxHx3),
    jnp.concatenate([_table(intervals, k), layer[None]]),
    layout,
    positions=k,
    length=jax.tree.leaves(key_LxBxKxGxD)[0].shape[2],
    scale=scale,
    soft_cap=soft_cap,
  )
  per_core = [
    (
      layout.from_query_rows(out_BxRxD, Q, H),
      layout.from_query_rows(log_sum_exp_BxRx1, Q, H)[..., 0],
    )
    for out_BxRxD, log_sum_exp_BxRx1 in zip(out_CxBxRxD, log_sum_exp_CxBxRx1)
  ]
  return per_core[0] if len(per_core) == 1 else merge(per_core)


def block_positions(key_LxBxKxGxD: Cached, Q: int, H: int) -> int:
  """Positions in a block, a multiple of a TPU's lanes."""
  num_bytes, num_scores = _of_a_stretch(key_LxBxKxGxD, Q, H)
  fit = min(DECODE_BLOCK_BYTES // num_bytes, BLOCK_SCORES // num_scores)
  return min(jax.tree.leaves(key_LxBxKxGxD)[0].shape[2], max(fit, 1) * STRETCH)


def unsupported(query_BxQxHxD, key_LxBxKxGxD: Cached) -> str | None:
  """What stands against this kernel here, or None; see `kernels.decode.backend.Backend`."""
  numbers = jax.tree.leaves(key_LxBxKxGxD)[0]
  K, G, D = numbers.shape[2:]
  reason = pallas_tpu.unsupported(query_BxQxHxD, key_LxBxKxGxD)
  if reason is not None:
    return reason
  if K % STRETCH:
    return f"{K} cached positions are no multiple of {STRETCH}; allocate more or use 'xla'"
  if layout_of(key_LxBxKxGxD) is None:
    return f"it would copy a cache of {G} {numbers.dtype} heads of {D}; use 'xla'"
  num_bytes, num_scores = _of_a_stretch(key_LxBxKxGxD, *query_BxQxHxD.shape[1:3])
  shares = query_BxQxHxD.dtype.itemsize // 2  # Products of float32 take several registers.
  if num_bytes * shares > 2 * DECODE_BLOCK_BYTES or num_scores * shares > MOST_SCORES:
    return f"{G} key heads on one device overflow its vector memory; shard them or use 'xla'"
  return None


def _of_a_stretch(key_LxBxKxGxD: Cached, Q: int, H: int) -> tuple[int, int]:
  """Bytes of keys, and scores, of the fewest positions in a block."""
  numbers, layout = jax.tree.leaves(key_LxBxKxGxD)[0], layout_of(key_LxBxKxGxD)
  G, D = numbers.shape[3:]
  scores = sum(
    (piece.rows.stop - piece.rows.start) * (piece.columns.stop - piece.columns.start)
    for piece in layout.pieces(layout.num_rows(Q, H), STRETCH)
  )
  return STRETCH * G * D * numbers.dtype.itemsize, scores


PALLAS_TPU = Backend("pallas_tpu", unsupported, partial)


def _table(intervals: KeyIntervals, k: int) -> jax.Array:
  """int32 [B * 4]: blocks FIRST..STOP of a row hold all that its queries see.

  In blocks FULL_FIRST..FULL_STOP every query sees every key, so that they need no mask.
  """
  start_BxQ, stop_BxQ = intervals
  is_empty_BxQ = stop_BxQ <= start_BxQ
  stop_B = -(-jnp.max(jnp.where(is_empty_BxQ, 0, stop_BxQ), axis=1) // k)
  last_key = jnp.iinfo(jnp.int32).max
  first_B = jnp.min(jnp.where(is_empty_BxQ, last_key, start_BxQ), axis=1) // k
  full_first_B = -(-jnp.max(start_BxQ, axis=1) // k)
  full_stop_B = jnp.min(stop_BxQ, axis=1) // k
  fields = (jnp.minimum(first_B, stop_B), stop_B, full_first_B, full_stop_B)
  return jnp.stack(fields, axis=1).reshape(-1)


def call(
  query_BxRxD,
  keys: Cached,
  values: Cached,
  facts_BxRx3,
  table,
  layout: Rows | Heads,
  *,
  positions: int,
  length: int,
  scale: float,
  soft_cap: float | None,
):
  """The kernel.

  Args:
    query_BxRxD: in the order of `layout.query_rows`.
    keys: as `view` gives them, all layers.
    values: likewise.
    facts_BxRx3: int32; start, stop and key/value head of each row.
    table: int32 [B * 4 + 1]; `_table`, then the layer.
    layout: of keys and values.
    positions: in a block.
    length: K.
    scale: as in `attention`.
    soft_cap: as in `attention`.

  Returns:
    (out [C, B, R, D], log_sum_exp [C, B, R, 1]) float32, of the blocks of each core.
  """
  B, R, D = query_BxRxD.shape
  k, cores = positions, pallas_tpu.num_cores()

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
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=vmem_bytes(pallas_tpu.device().device_kind),
    ),
    name="attention_decode",
  )(table, query_BxRxD, facts_BxRx3, keys, values)


class BlockWalk:
  """The blocks that a core visits in each batch row; block i of row b has index b * M + i."""

  def __init__(self, table_ref, num_blocks: int, core: jax.Array, cores: jax.Array):
    self.table_ref, self.num_blocks, self.core, self.cores = table_ref, num_blocks, core, cores

  def field(self, row, field):
    return row * self.num_blocks + self.table_ref[4 * row + field]

  def first(self, row):
    return self.field(row, FIRST) + self.core

  def following(self, row, index):
    return index + self.cores

  def stop(self, row):
    return self.field(row, STOP)

  def is_full(self, row, index):
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
  layer, batch_row = table_ref[table_ref.shape[0] - 1], pl.program_id(1)
  walk = BlockWalk(table_ref, num_blocks, pl.program_id(0), pl.num_programs(0))
  pieces = layout.pieces(query_ref.shape[1], k)
  sum_out_ref[...] = jnp.zeros_like(sum_out_ref)
  maximum_ref[...] = jnp.full_like(maximum_ref, LOWEST)
  sum_ref[...] = jnp.zeros_like(sum_ref)

  def begin_of(index):
    # The last block of a row reaches back where K is no multiple of k.
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
    """Cached numbers in the query's dtype, and the scale of each column: [1, c] or 1."""
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
      # The scores of the next come first, so that matrix and vector units work at the same time.
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

  stream(
    walk,
    copies,
    lambda index, slot: by_mask(walk.is_full(batch_row, index), index, slot, add),
    count_ref,
    axis=1,
  )
  out_ref[0, 0], log_sum_exp_ref[0, 0] = normalised(
    sum_out_ref[...], maximum_ref[...], sum_ref[...]
  )
