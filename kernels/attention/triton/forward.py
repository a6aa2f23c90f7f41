"""The Triton forward kernel of attention.

One program holds a query block of one head and loops over the key blocks that meet an interval: the
full ones, inside every interval, without mask and bounds checks, and the others with a mask. The
online softmax (arXiv 1805.02867, 2205.14135, 2307.08691) allows any order. It runs in base 2 and
float32; weights are rounded to the dtype of the inputs before they multiply the values.

Arrays are row-major. Offsets of blocks are int64, offsets inside a block int32. B batch, Q/K
query/key length, H query heads, G = H / GROUP key/value heads, D head_dim, q/k queries/keys per
block.
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
def forward(
  query_BxQxHxD: tl.tensor,
  key_BxKxGxD: tl.tensor,
  value_BxKxGxD: tl.tensor,
  start_BxQ: tl.tensor,
  stop_BxQ: tl.tensor,
  num_queries: tl.tensor,
  num_keys: tl.tensor,
  num_heads: tl.tensor,
  out_BxQxHxD: tl.tensor,
  log_sum_exp_BxHxQ: tl.tensor,
  GROUP: tl.constexpr,
  HEAD_DIM: tl.constexpr,
  QUERY_BLOCK: tl.constexpr,
  KEY_BLOCK: tl.constexpr,
  SCALE: tl.constexpr,
  SOFT_CAP: tl.constexpr,
  PRECISION: tl.constexpr,
) -> None:
  """Grid (query blocks, H, B). The last blocks start first: a causal mask gives them most work."""
  block = tl.num_programs(0) - 1 - tl.program_id(0)
  head = tl.program_id(1)
  batch = tl.program_id(2).to(tl.int64)
  key_stride = num_heads // GROUP * HEAD_DIM
  row_q = tl.arange(0, QUERY_BLOCK)
  index_q = block * QUERY_BLOCK + row_q
  is_query_q = index_q < num_queries
  row_k = tl.arange(0, KEY_BLOCK)
  index_D = tl.arange(0, HEAD_DIM)

  start_q = tl.load(start_BxQ + batch * num_queries + index_q, mask=is_query_q, other=0)
  stop_q = tl.load(stop_BxQ + batch * num_queries + index_q, mask=is_query_q, other=0)
  query_offset = ((batch * num_queries + block * QUERY_BLOCK) * num_heads + head) * HEAD_DIM
  offsets_qxD = row_q[:, None] * (num_heads * HEAD_DIM) + index_D[None, :]
  query_qxD = load_rows(query_BxQxHxD + query_offset + offsets_qxD, is_query_q, False)
  head_offset = batch * num_keys * key_stride + head // GROUP * HEAD_DIM
  offsets_kxD = row_k[:, None] * key_stride + index_D[None, :]

  out_qxD = tl.full((QUERY_BLOCK, HEAD_DIM), 0.0, tl.float32)
  maximum_q = tl.full((QUERY_BLOCK,), LOWEST, tl.float32)
  sum_q = tl.full((QUERY_BLOCK,), 0.0, tl.float32)
  first, stop, full_first, full_stop = meeting_blocks(start_q, stop_q, num_keys, KEY_BLOCK)
  num_full = full_stop - full_first
  for IS_FULL in tl.static_range(2):
    for step in range(num_full if IS_FULL else stop - first - num_full):
      key_block = block_at(step, first, full_first, full_stop, IS_FULL)
      index_k = key_block * KEY_BLOCK + row_k
      block_offset = head_offset + key_block.to(tl.int64) * KEY_BLOCK * key_stride
      key_kxD = load_rows(key_BxKxGxD + block_offset + offsets_kxD, index_k < num_keys, IS_FULL)
      products_qxk = tl.dot(query_qxD, tl.trans(key_kxD), input_precision=PRECISION)
      scores_qxk, _ = base_2_scores(products_qxk, SCALE, SOFT_CAP)
      if not IS_FULL:
        is_seen_qxk = (index_k[None, :] >= start_q[:, None]) & (index_k[None, :] < stop_q[:, None])
        scores_qxk = tl.where(is_seen_qxk, scores_qxk, float("-inf"))
      weights_qxk, decay_q, maximum_q, sum_q = online_softmax(scores_qxk, maximum_q, sum_q)
      value_kxD = load_rows(value_BxKxGxD + block_offset + offsets_kxD, index_k < num_keys, IS_FULL)
      out_qxD = tl.dot(
        weights_qxk.to(value_kxD.dtype),
        value_kxD,
        out_qxD * decay_q[:, None],
        input_precision=PRECISION,
      )

  # Rows with an empty interval have collected the full blocks of their neighbours.
  is_empty_q = stop_q <= start_q
  sum_q = tl.where(is_empty_q, 1.0, sum_q)
  out_qxD = tl.where(is_empty_q[:, None], 0.0, out_qxD / sum_q[:, None])
  out_qxD = out_qxD.to(out_BxQxHxD.dtype.element_ty)
  tl.store(out_BxQxHxD + query_offset + offsets_qxD, out_qxD, mask=is_query_q[:, None])
  log_sum_exp_q = tl.where(is_empty_q, float("-inf"), (maximum_q + tl.log2(sum_q)) * LN_2)
  offset_q = (batch * num_heads + head) * num_queries + index_q
  tl.store(log_sum_exp_BxHxQ + offset_q, log_sum_exp_q, mask=is_query_q)
