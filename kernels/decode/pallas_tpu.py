"""Decode on TPU v4 and later: one Pallas (Mosaic) kernel over the cache where it lies.

A cache's positions and key/value heads are taken as one axis of c = K * G rows, as they stand in
memory: nothing is sliced, transposed or copied. Blocks of rows that meet an interval stream from
HBM, and all query heads multiply all rows of a block; a row of another head is masked like a key
outside the interval. The matrix units are filled with a block's rows whoever reads them, so that
this costs no time while the copies take longer than the products, and each key is loaded once.

Where two TensorCores make a device, they take turns at the blocks, and their results merge.

L layers, B batch, Q query length, K cached positions, H query heads, G key/value heads, D head_dim,
R rows of queries (Q * H and padding), M blocks of a batch row, k positions and c rows of the cache
in a block.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from kernels.attention import pallas_tpu
from kernels.attention.block_sizes_tpu import vmem_bytes
from kernels.attention.intervals import KeyIntervals
from kernels.attention.merge import merge
from kernels.attention.pallas_tpu_forward import LOG2_E
from kernels.attention.pallas_tpu_forward import LOWEST
from kernels.attention.pallas_tpu_forward import by_mask
from kernels.attention.pallas_tpu_forward import dot
from kernels.attention.pallas_tpu_forward import scores
from kernels.attention.pallas_tpu_forward import varying
from kernels.attention.pallas_tpu_stream import stream
from kernels.attention.pallas_tpu_tiles import LANES
from kernels.attention.pallas_tpu_tiles import round_up
from kernels.decode.backend import Backend
from kernels.decode.cache import Cached
from kernels.decode.cache import Quantized

# Of a block of keys or of values. Four are held: two of each, one of which is on its way.
BLOCK_BYTES = 2**20
# Rows of the cache whose scores are held at once.
PART = 1024
# Query rows come in packed registers of bfloat16.
SUBLANES = 16
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
  B, Q, H, D = query_BxQxHxD.shape
  K, G = jax.tree.leaves(key_LxBxKxGxD)[0].shape[2:4]
  k, cores = block_positions(K, G, D, _itemsize(key_LxBxKxGxD)), pallas_tpu.num_cores()
  R = round_up(Q * H, SUBLANES)
  padding = ((0, 0), (0, R - Q * H), (0, 0))
  query_BxRxD = jnp.pad(query_BxQxHxD.reshape(B, Q * H, D), padding)
  group_H = jnp.arange(H, dtype=jnp.int32) // (H // G)
  facts = (*intervals, jnp.broadcast_to(group_H, (B, Q, H)))
  facts_BxRx3 = jnp.stack(
      [jnp.broadcast_to(fact.reshape(B, Q, -1), (B, Q, H)).reshape(B, -1) for fact in facts], axis=2
  )
  out_CxBxRxD, log_sum_exp_CxBxR = _call(
      query_BxRxD,
      _rows(key_LxBxKxGxD),
      _rows(value_LxBxKxGxD),
      jnp.pad(facts_BxRx3, padding),
      jnp.concatenate([_table(intervals, k), layer[None]]),
      num_key_heads=G,
      positions=k,
      cores=cores,
      scale=scale,
      soft_cap=soft_cap,
  )
  per_core = [
      (
          out_BxRxD[:, : Q * H].reshape(B, Q, H, D),
          log_sum_exp_BxR[:, : Q * H].reshape(B, Q, H),
      )
      for out_BxRxD, log_sum_exp_BxR in zip(out_CxBxRxD, log_sum_exp_CxBxR)
  ]
  return per_core[0] if cores == 1 else merge(per_core)


def block_positions(K: int, G: int, D: int, itemsize: int) -> int:
  """Positions in a block, a multiple of the lanes so that scales of int8 blocks are whole tiles."""
  fit = BLOCK_BYTES // (G * max(D, LANES) * itemsize) // LANES * LANES
  return min(K, max(fit, LANES))


def unsupported(query_BxQxHxD, key_LxBxKxGxD: Cached) -> str | None:
  """What stands against this kernel here, or None; see `kernels.decode.backend.Backend`."""
  K, G, D = jax.tree.leaves(key_LxBxKxGxD)[0].shape[2:]
  if K % LANES:
    return f"{K} cached positions are no multiple of {LANES}; allocate more or use 'xla'"
  if G & (G - 1):
    return f"{G} key heads are no power of two; use 'xla'"
  if LANES * G * max(D, LANES) * _itemsize(key_LxBxKxGxD) > 2 * BLOCK_BYTES:
    return f"{G} key heads on one device overflow its vector memory; shard them or use 'xla'"
  return pallas_tpu.unsupported(query_BxQxHxD, key_LxBxKxGxD)


PALLAS_TPU = Backend("pallas_tpu", unsupported, partial)


def _itemsize(cached: Cached) -> int:
  return jax.tree.leaves(cached)[0].dtype.itemsize


def _rows(cached: Cached) -> Cached:
  """[L, B, K * G, D], and scales [L, B, G, K]: how XLA lays them out in memory anyway."""
  if isinstance(cached, Quantized):
    return Quantized(_rows(cached.value), jnp.swapaxes(cached.scale, 2, 3))
  return cached.reshape(*cached.shape[:2], -1, cached.shape[4])


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


def _call(
    query_BxRxD,
    keys: Cached,
    values: Cached,
    facts_BxRx3,
    table,
    *,
    num_key_heads: int,
    positions: int,
    cores: int,
    scale: float,
    soft_cap: float | None,
):
  """Returns out [cores, B, R, D] and log_sum_exp [cores, B, R], float32."""
  B, R, D = query_BxRxD.shape
  rows = lambda width: pl.BlockSpec((1, R, width), lambda core, row: (row, 0, 0))
  result = lambda width: pl.BlockSpec((1, 1, R, width), lambda core, row: (core, row, 0, 0))
  in_place = lambda cached: jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), cached)
  k, G = positions, num_key_heads

  def buffers(cached):
    if isinstance(cached, Quantized):
      return Quantized(buffers(cached.value), pltpu.VMEM((2, G, k), jnp.float32))
    return pltpu.VMEM((2, k * G, D), cached.dtype)

  out_CxBxRxD, log_sum_exp_CxBxRx1 = pl.pallas_call(
      functools.partial(_kernel, num_key_heads=G, scale=scale, soft_cap=soft_cap),
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
      name="decode_attention",
  )(table, query_BxRxD, facts_BxRx3, keys, values)
  return out_CxBxRxD, log_sum_exp_CxBxRx1[..., 0]


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
    num_key_heads: int,
    scale: float,
    soft_cap: float | None,
):
  G, c = num_key_heads, jax.tree.leaves(keys_ref)[0].shape[1]
  k, K = c // G, jax.tree.leaves(keys_hbm_ref)[0].shape[2] // G
  num_blocks, batch_row = pl.cdiv(K, k), pl.program_id(1)
  layer = table_ref[table_ref.shape[0] - 1]
  walk = BlockWalk(table_ref, num_blocks, pl.program_id(0), pl.num_programs(0))
  query_RxD = query_ref[0]
  start_Rx1, stop_Rx1, group_Rx1 = (facts_ref[0, :, fact : fact + 1] for fact in range(3))
  sum_out_ref[...] = jnp.zeros_like(sum_out_ref)
  maximum_ref[...] = jnp.full_like(maximum_ref, LOWEST)
  sum_ref[...] = jnp.zeros_like(sum_ref)

  def begin_of(index):
    # The last block of a row reaches back where K is no multiple of k.
    return pl.multiple_of(jnp.minimum(index % num_blocks * k, K - k), LANES)

  def copies(index, slot):
    row, begin = index // num_blocks, begin_of(index)
    pairs = []
    for source, buffer in ((keys_hbm_ref, keys_ref), (values_hbm_ref, values_ref)):
      if isinstance(source, Quantized):
        pairs.append((source.scale.at[layer, row, :, pl.ds(begin, k)], buffer.scale))
        source, buffer = source.value, buffer.value
      pairs.append((source.at[layer, row, pl.ds(begin * G, c)], buffer))
    return [
        pltpu.make_async_copy(source, buffer.at[slot], semaphores.at[number, slot])
        for number, (source, buffer) in enumerate(pairs)
    ]

  def load(ref, slot, part):
    """Rows of the cache as numbers [p, D] of the query's dtype, and their scales [1, p]."""
    if isinstance(ref, Quantized):
      numbers_pxD = ref.value[slot, part].astype(jnp.float32).astype(query_RxD.dtype)
      return numbers_pxD, _row_scales(ref.scale, slot, part, G)
    return ref[slot, part], 1.0

  def part_scores(part, index, slot, is_masked):
    key_pxD, key_scale_1xp = load(keys_ref, slot, part)
    scores_Rxp, _ = scores(query_RxD, key_pxD, scale * key_scale_1xp, soft_cap)
    row_Rxp = jax.lax.broadcasted_iota(jnp.int32, scores_Rxp.shape, 1) + part.start
    is_seen_Rxp = row_Rxp & (G - 1) == group_Rx1
    if is_masked:
      position_Rxp = begin_of(index) + (row_Rxp >> (G.bit_length() - 1))
      lower_Rx1 = jnp.maximum(start_Rx1, index % num_blocks * k)
      is_seen_Rxp &= (position_Rxp >= lower_Rx1) & (position_Rxp < stop_Rx1)
    return jnp.where(is_seen_Rxp, scores_Rxp, -jnp.inf)

  def add(index, slot, is_masked):
    parts = [slice(first, min(first + PART, c)) for first in range(0, c, PART)]
    next_scores_Rxp = part_scores(parts[0], index, slot, is_masked)
    for part, next_part in zip(parts, [*parts[1:], None]):
      scores_Rxp = next_scores_Rxp
      if next_part is not None:
        next_scores_Rxp = part_scores(next_part, index, slot, is_masked)
      old_maximum_Rx1 = maximum_ref[...]
      maximum_Rx1 = jnp.maximum(old_maximum_Rx1, jnp.max(scores_Rxp, axis=1, keepdims=True))
      weights_Rxp = jnp.exp2(scores_Rxp - maximum_Rx1)
      decay_Rx1 = jnp.exp2(old_maximum_Rx1 - maximum_Rx1)
      maximum_ref[...] = maximum_Rx1
      sum_ref[...] = decay_Rx1 * sum_ref[...] + jnp.sum(weights_Rxp, axis=1, keepdims=True)
      value_pxD, value_scale_1xp = load(values_ref, slot, part)
      weights_Rxp = (weights_Rxp * value_scale_1xp).astype(value_pxD.dtype)
      sum_out_ref[...] = decay_Rx1 * sum_out_ref[...] + dot(weights_Rxp, value_pxD, (1, 0))

  stream(
      walk,
      copies,
      lambda index, slot: by_mask(walk.is_full(batch_row, index), index, slot, add),
      count_ref,
      axis=1,
  )
  sum_Rx1 = sum_ref[...]
  is_empty_Rx1 = sum_Rx1 == 0
  sum_Rx1 = jnp.where(is_empty_Rx1, 1.0, sum_Rx1)
  out_ref[0, 0] = sum_out_ref[...] * (1.0 / sum_Rx1)
  log_sum_exp_ref[0, 0] = jnp.where(
      is_empty_Rx1, -jnp.inf, maximum_ref[...] / LOG2_E + jnp.log(sum_Rx1)
  )


def _row_scales(scale_ref, slot, part: slice, G: int):
  """The scales [1, p] of a part's rows, out of a block's [G, k]: row p is of head p % G."""
  head_GxT = jax.lax.broadcasted_iota(jnp.int32, (G, LANES), 0)
  lane_GxT = jax.lax.broadcasted_iota(jnp.int32, (G, LANES), 1)
  tiles = []
  for tile in range(part.start // LANES, part.stop // LANES):
    first = tile // G * LANES
    source_GxT = scale_ref[slot, :, first : first + LANES]
    position_GxT = tile % G * (LANES // G) + (lane_GxT >> (G.bit_length() - 1))
    spread_GxT = jnp.take_along_axis(
        source_GxT, position_GxT, axis=1, mode="promise_in_bounds"
    )
    own_GxT = jnp.where(lane_GxT & (G - 1) == head_GxT, spread_GxT, 0.0)
    tiles.append(jnp.sum(own_GxT, axis=0, keepdims=True))
  return jnp.concatenate(tiles, axis=1)
