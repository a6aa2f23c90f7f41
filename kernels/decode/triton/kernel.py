"""The Triton kernel of decode attention, over splits of the cache.

This is flash-decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html). One program holds
the query rows of one key/value head (all queries of all heads of its group) and streams the key
blocks of its split, each loaded once for all rows: full blocks without a mask, the others with one.
For each batch row, the blocks that meet an interval are divided into equal splits, wherever they
are in the cache, so that a short sequence in a long cache keeps as many programs busy. The online
softmax (arXiv 1805.02867, 2205.14135) runs in base 2 and float32; weights are rounded to the dtype
of the query before they multiply the values.

An int8 cache stays int8 until it is in registers. Scales belong to positions, so they multiply
scores and weights instead of keys and values.

Arrays are row-major. Offsets of blocks are int64, offsets inside a block int32. L layers, P splits,
B batch, Q query length, K cached positions, H query heads, G = H / GROUP key/value heads,
D head_dim, r query rows per program, k keys per block.
"""

import triton
import triton.language as tl

from kernels.attention.triton.parts import (
  LN_2,
  LOWEST,
  base_2_scores,
  block_at,
  load_rows,
  meeting_blocks,
  online_softmax,
)


@triton.jit
def partial(
  query_BxQxHxD: tl.tensor,
  key_LxBxKxGxD: tl.tensor,
  value_LxBxKxGxD: tl.tensor,
  key_scale_LxBxKxG: tl.tensor,
  value_scale_LxBxKxG: tl.tensor,
  layer_1: tl.tensor,
  start_BxQ: tl.tensor,
  stop_BxQ: tl.tensor,
  num_queries: tl.tensor,
  num_keys: tl.tensor,
  num_kv_heads: tl.tensor,
  out_PxBxQxHxD: tl.tensor,
  log_sum_exp_PxBxQxH: tl.tensor,
  GROUP: tl.constexpr,
  HEAD_DIM: tl.constexpr,
  ROW_BLOCK: tl.constexpr,
  KEY_BLOCK: tl.constexpr,
  IS_QUANTIZED: tl.constexpr,
  SCALE: tl.constexpr,
  SOFT_CAP: tl.constexpr,
  PRECISION: tl.constexpr,
) -> None:
  """Grid (G * row blocks, P, B), so that programs that start together read adjacent memory.

  The scales are read only if `IS_QUANTIZED`.
  """
  tiles = tl.num_programs(0) // num_kv_heads
  kv_head = tl.program_id(0) // tiles
  split = tl.program_id(1)
  num_splits = tl.num_programs(1)
  batch = tl.program_id(2).to(tl.int64)
  batch_size = tl.num_programs(2)
  num_heads = num_kv_heads * GROUP
  key_stride = num_kv_heads * HEAD_DIM
  row_r = tl.program_id(0) % tiles * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
  is_row_r = row_r < num_queries * GROUP
  query_r = row_r // GROUP
  row_k = tl.arange(0, KEY_BLOCK)
  index_D = tl.arange(0, HEAD_DIM)

  start_r = tl.load(start_BxQ + batch * num_queries + query_r, mask=is_row_r, other=0)
  stop_r = tl.load(stop_BxQ + batch * num_queries + query_r, mask=is_row_r, other=0)
  offset_r = query_r * num_heads + kv_head * GROUP + row_r % GROUP
  offsets_rxD = offset_r[:, None] * HEAD_DIM + index_D[None, :]
  first_query = batch * num_queries * num_heads
  query_rxD = tl.load(
    query_BxQxHxD + first_query * HEAD_DIM + offsets_rxD, mask=is_row_r[:, None], other=0.0
  )

  first, stop, full_first, full_stop = meeting_blocks(start_r, stop_r, num_keys, KEY_BLOCK)
  num_blocks = (stop - first + num_splits - 1) // num_splits
  first = tl.minimum(first + split * num_blocks, stop)
  stop = tl.minimum(first + num_blocks, stop)
  full_first = tl.minimum(tl.maximum(full_first, first), stop)
  full_stop = tl.maximum(tl.minimum(full_stop, stop), full_first)
  # Blocks and keys that no row sees are not read: the cache may hold anything there.
  is_empty_r = stop_r <= start_r
  first_key = tl.min(tl.where(is_empty_r, num_keys, start_r), 0)
  stop_key = tl.max(tl.where(is_empty_r, 0, stop_r), 0)
  first_row = (tl.load(layer_1).to(tl.int64) * batch_size + batch) * num_keys
  offsets_kxD = row_k[:, None] * key_stride + kv_head * HEAD_DIM + index_D[None, :]

  out_rxD = tl.full((ROW_BLOCK, HEAD_DIM), 0.0, tl.float32)
  maximum_r = tl.full((ROW_BLOCK,), LOWEST, tl.float32)
  sum_r = tl.full((ROW_BLOCK,), 0.0, tl.float32)
  num_full = full_stop - full_first
  for IS_FULL in tl.static_range(2):
    for step in range(num_full if IS_FULL else stop - first - num_full):
      block = block_at(step, first, full_first, full_stop, IS_FULL)
      index_k = block * KEY_BLOCK + row_k
      is_key_k = (index_k >= first_key) & (index_k < stop_key)
      block_row = first_row + block * KEY_BLOCK
      key_kxD = load_rows(
        key_LxBxKxGxD + block_row * key_stride + offsets_kxD, is_key_k, IS_FULL
      ).to(query_rxD.dtype)
      products_rxk = tl.dot(query_rxD, tl.trans(key_kxD), input_precision=PRECISION)
      if IS_QUANTIZED:
        scales = block_row * num_kv_heads + row_k * num_kv_heads + kv_head
        key_scale_k = tl.load(key_scale_LxBxKxG + scales, mask=is_key_k, other=0.0)
        products_rxk *= key_scale_k[None, :]
      scores_rxk = base_2_scores(products_rxk, SCALE, SOFT_CAP)[0]
      if not IS_FULL:
        is_seen_rxk = (index_k[None, :] >= start_r[:, None]) & (index_k[None, :] < stop_r[:, None])
        scores_rxk = tl.where(is_seen_rxk, scores_rxk, float("-inf"))
      weights_rxk, decay_r, maximum_r, sum_r = online_softmax(scores_rxk, maximum_r, sum_r)
      value_kxD = load_rows(
        value_LxBxKxGxD + block_row * key_stride + offsets_kxD, is_key_k, IS_FULL
      ).to(query_rxD.dtype)
      if IS_QUANTIZED:
        value_scale_k = tl.load(value_scale_LxBxKxG + scales, mask=is_key_k, other=0.0)
        weights_rxk *= value_scale_k[None, :]
      out_rxD = tl.dot(
        weights_rxk.to(query_rxD.dtype),
        value_kxD,
        out_rxD * decay_r[:, None],
        input_precision=PRECISION,
      )

  # Empty here: rows that see no key of this split, and rows with an empty interval, which may have
  # collected full blocks.
  is_empty_r |= sum_r == 0.0
  sum_r = tl.where(is_empty_r, 1.0, sum_r)
  partial_query = (split * batch_size + batch) * num_queries * num_heads
  out_rxD = tl.where(is_empty_r[:, None], 0.0, out_rxD / sum_r[:, None])
  tl.store(out_PxBxQxHxD + partial_query * HEAD_DIM + offsets_rxD, out_rxD, mask=is_row_r[:, None])
  log_sum_exp_r = tl.where(is_empty_r, float("-inf"), (maximum_r + tl.log2(sum_r)) * LN_2)
  tl.store(log_sum_exp_PxBxQxH + partial_query + offset_r, log_sum_exp_r, mask=is_row_r)
