"""The Triton backward kernels of attention: the gradient of query, and those of key and value.

As in the forward kernel, a program visits the blocks that meet an interval, full ones without a
mask. With p = exp(score - log_sum_exp) and ds = p * (dp - delta): dvalue = p^T dout, dkey = ds^T
query, dquery = ds key (arXiv 2205.14135, 2307.08691). Nothing is added atomically, so gradients are
the same in every run.

Arrays are row-major. B batch, Q/K query/key length, H query heads, G = H / GROUP key/value heads,
D head_dim, M key blocks, q/k queries/keys per block. log_sum_exp is in units of log 2, and +inf for
queries with an empty interval, so that their weights are 0.
"""

import triton
import triton.language as tl

from kernels.attention.triton.parts import base_2_scores, block_at, load_rows, meeting_blocks


@triton.jit
def query_grad(
  query_BxQxHxD: tl.tensor,
  key_BxKxGxD: tl.tensor,
  value_BxKxGxD: tl.tensor,
  start_BxQ: tl.tensor,
  stop_BxQ: tl.tensor,
  out_cotangent_BxQxHxD: tl.tensor,
  log_sum_exp_BxHxQ: tl.tensor,
  delta_BxHxQ: tl.tensor,
  num_queries: tl.tensor,
  num_keys: tl.tensor,
  num_heads: tl.tensor,
  grad_BxQxHxD: tl.tensor,
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
  offset_q = (batch * num_heads + head) * num_queries + index_q
  log_sum_exp_q = tl.load(log_sum_exp_BxHxQ + offset_q, mask=is_query_q, other=float("inf"))
  delta_q = tl.load(delta_BxHxQ + offset_q, mask=is_query_q, other=0.0)
  query_offset = ((batch * num_queries + block * QUERY_BLOCK) * num_heads + head) * HEAD_DIM
  offsets_qxD = row_q[:, None] * (num_heads * HEAD_DIM) + index_D[None, :]
  query_qxD = load_rows(query_BxQxHxD + query_offset + offsets_qxD, is_query_q, False)
  out_cotangent_qxD = load_rows(
    out_cotangent_BxQxHxD + query_offset + offsets_qxD, is_query_q, False
  )
  head_offset = batch * num_keys * key_stride + head // GROUP * HEAD_DIM
  offsets_kxD = row_k[:, None] * key_stride + index_D[None, :]

  grad_qxD = tl.full((QUERY_BLOCK, HEAD_DIM), 0.0, tl.float32)
  first, stop, full_first, full_stop = meeting_blocks(start_q, stop_q, num_keys, KEY_BLOCK)
  num_full = full_stop - full_first
  for IS_FULL in tl.static_range(2):
    for step in range(num_full if IS_FULL else stop - first - num_full):
      key_block = block_at(step, first, full_first, full_stop, IS_FULL)
      index_k = key_block * KEY_BLOCK + row_k
      block_offset = head_offset + key_block.to(tl.int64) * KEY_BLOCK * key_stride
      key_kxD = load_rows(key_BxKxGxD + block_offset + offsets_kxD, index_k < num_keys, IS_FULL)
      value_kxD = load_rows(value_BxKxGxD + block_offset + offsets_kxD, index_k < num_keys, IS_FULL)
      products_qxk = tl.dot(query_qxD, tl.trans(key_kxD), input_precision=PRECISION)
      scores_qxk, slope_qxk = base_2_scores(products_qxk, SCALE, SOFT_CAP)
      weights_qxk = tl.exp2(scores_qxk - log_sum_exp_q[:, None])
      if not IS_FULL:
        is_seen_qxk = (index_k[None, :] >= start_q[:, None]) & (index_k[None, :] < stop_q[:, None])
        weights_qxk = tl.where(is_seen_qxk, weights_qxk, 0.0)
      weights_grad_qxk = tl.dot(out_cotangent_qxD, tl.trans(value_kxD), input_precision=PRECISION)
      scores_grad_qxk = weights_qxk * (weights_grad_qxk - delta_q[:, None]) * slope_qxk
      grad_qxD = tl.dot(
        scores_grad_qxk.to(key_kxD.dtype), key_kxD, grad_qxD, input_precision=PRECISION
      )
  tl.store(grad_BxQxHxD + query_offset + offsets_qxD, grad_qxD * SCALE, mask=is_query_q[:, None])


@triton.jit
def key_value_grad(
  query_BxQxHxD: tl.tensor,
  key_BxKxGxD: tl.tensor,
  value_BxKxGxD: tl.tensor,
  start_BxQ: tl.tensor,
  stop_BxQ: tl.tensor,
  out_cotangent_BxQxHxD: tl.tensor,
  log_sum_exp_BxHxQ: tl.tensor,
  delta_BxHxQ: tl.tensor,
  tables_Bx4xM: tl.tensor,
  num_queries: tl.tensor,
  num_keys: tl.tensor,
  num_heads: tl.tensor,
  key_grad_BxKxGxD: tl.tensor,
  value_grad_BxKxGxD: tl.tensor,
  GROUP: tl.constexpr,
  HEAD_DIM: tl.constexpr,
  QUERY_BLOCK: tl.constexpr,
  KEY_BLOCK: tl.constexpr,
  SCALE: tl.constexpr,
  SOFT_CAP: tl.constexpr,
  PRECISION: tl.constexpr,
) -> None:
  """Grid (key blocks, G, B). Each program sums over the query heads of its group.

  `tables_Bx4xM` holds the ranges of query blocks (`kernels.attention.block_tables.of_keys`). In
  full blocks every query exists.
  """
  block = tl.program_id(0)
  kv_head = tl.program_id(1)
  batch = tl.program_id(2).to(tl.int64)
  query_stride = num_heads * HEAD_DIM
  num_kv_heads = num_heads // GROUP
  row_k = tl.arange(0, KEY_BLOCK)
  index_k = block * KEY_BLOCK + row_k
  is_key_k = index_k < num_keys
  row_q = tl.arange(0, QUERY_BLOCK)
  index_D = tl.arange(0, HEAD_DIM)
  key_offset = ((batch * num_keys + block * KEY_BLOCK) * num_kv_heads + kv_head) * HEAD_DIM
  offsets_kxD = row_k[:, None] * (num_kv_heads * HEAD_DIM) + index_D[None, :]
  key_kxD = load_rows(key_BxKxGxD + key_offset + offsets_kxD, is_key_k, False)
  value_kxD = load_rows(value_BxKxGxD + key_offset + offsets_kxD, is_key_k, False)
  offsets_qxD = row_q[:, None] * query_stride + index_D[None, :]

  key_grad_kxD = tl.full((KEY_BLOCK, HEAD_DIM), 0.0, tl.float32)
  value_grad_kxD = tl.full((KEY_BLOCK, HEAD_DIM), 0.0, tl.float32)
  num_blocks = tl.num_programs(0)
  tables = tables_Bx4xM + batch * 4 * num_blocks + block
  first, stop = tl.load(tables), tl.load(tables + num_blocks)
  full_first, full_stop = tl.load(tables + 2 * num_blocks), tl.load(tables + 3 * num_blocks)
  num_full = full_stop - full_first
  for IS_FULL in tl.static_range(2):
    # One flat loop over query blocks and the heads of the group, which Triton can pipeline.
    for step in range(GROUP * (num_full if IS_FULL else stop - first - num_full)):
      query_block = block_at(step // GROUP, first, full_first, full_stop, IS_FULL)
      head = kv_head * GROUP + step % GROUP
      index_q = query_block * QUERY_BLOCK + row_q
      is_query_q = index_q < num_queries
      first_row = batch * num_queries + query_block * QUERY_BLOCK
      block_offset = first_row * query_stride + head * HEAD_DIM
      query_qxD = load_rows(query_BxQxHxD + block_offset + offsets_qxD, is_query_q, IS_FULL)
      out_cotangent_qxD = load_rows(
        out_cotangent_BxQxHxD + block_offset + offsets_qxD, is_query_q, IS_FULL
      )
      offset_q = (batch * num_heads + head) * num_queries + index_q
      log_sum_exp_q = tl.load(log_sum_exp_BxHxQ + offset_q, mask=is_query_q, other=float("inf"))
      delta_q = tl.load(delta_BxHxQ + offset_q, mask=is_query_q, other=0.0)
      # Keys first, so that weights and score gradients are left operands without a transpose.
      products_kxq = tl.dot(key_kxD, tl.trans(query_qxD), input_precision=PRECISION)
      scores_kxq, slope_kxq = base_2_scores(products_kxq, SCALE, SOFT_CAP)
      weights_kxq = tl.exp2(scores_kxq - log_sum_exp_q[None, :])
      if not IS_FULL:
        start_q = tl.load(start_BxQ + batch * num_queries + index_q, mask=is_query_q, other=0)
        stop_q = tl.load(stop_BxQ + batch * num_queries + index_q, mask=is_query_q, other=0)
        is_seen_kxq = (index_k[:, None] >= start_q[None, :]) & (index_k[:, None] < stop_q[None, :])
        weights_kxq = tl.where(is_seen_kxq, weights_kxq, 0.0)
      value_grad_kxD = tl.dot(
        weights_kxq.to(value_kxD.dtype),
        out_cotangent_qxD,
        value_grad_kxD,
        input_precision=PRECISION,
      )
      weights_grad_kxq = tl.dot(value_kxD, tl.trans(out_cotangent_qxD), input_precision=PRECISION)
      scores_grad_kxq = weights_kxq * (weights_grad_kxq - delta_q[None, :]) * slope_kxq
      key_grad_kxD = tl.dot(
        scores_grad_kxq.to(key_kxD.dtype), query_qxD, key_grad_kxD, input_precision=PRECISION
      )
  is_key_kx1 = is_key_k[:, None]
  tl.store(key_grad_BxKxGxD + key_offset + offsets_kxD, key_grad_kxD * SCALE, mask=is_key_kx1)
  tl.store(value_grad_BxKxGxD + key_offset + offsets_kxD, value_grad_kxD, mask=is_key_kx1)
