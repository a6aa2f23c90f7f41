"""Blockwise attention in plain JAX. It runs everywhere and needs O(S) memory.

For every batch row and query block, one loop runs over the full key blocks, which need no mask, and
another over the other key blocks that meet an interval. The remaining blocks are neither loaded nor
computed. Forward is the online softmax (arXiv 1805.02867, 2205.14135). Backward is one pass that
recomputes the scores and accumulates the gradients of key and value in place.

B batch, Q/K query/key length, H query heads, G key/value heads, R = H / G, D head_dim,
N query blocks, q/k queries/keys per block, T = B * N tiles.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from kernels.attention import block_tables
from kernels.attention.backend import Backend
from kernels.attention.intervals import KeyIntervals

QUERY_BLOCK = 256
KEY_BLOCK = 256


def forward(
  query_BxQxHxD: jax.Array,
  key_BxKxGxD: jax.Array,
  value_BxKxGxD: jax.Array,
  intervals: KeyIntervals,
  *,
  scale: float,
  soft_cap: float | None,
  out_dtype: jnp.dtype,
  sizes: Mapping[str, tuple[int, int]] = {},
) -> tuple[jax.Array, jax.Array]:
  """See `kernels.attention.backend.Forward`."""
  B, Q, H, D = query_BxQxHxD.shape
  G = key_BxKxGxD.shape[2]
  dtype = query_BxQxHxD.dtype
  q, k = sizes.get("forward", (QUERY_BLOCK, KEY_BLOCK))
  q, k = _block(Q, q), _block(key_BxKxGxD.shape[1], k)
  # With several query blocks, transposing all keys once is cheapest. A single query block, as in
  # decoding, reads each key once, and transposing a whole cache would cost more than the attention.
  key_rows, value_rows = _pad(key_BxKxGxD, k), _pad(value_BxKxGxD, k)
  load: Callable = _load_transposed
  if q < Q:
    key_rows, value_rows, load = jnp.swapaxes(key_rows, 1, 2), jnp.swapaxes(value_rows, 1, 2), _load
  query_TxGxRqxD = _query_tiles(query_BxQxHxD, G, q)
  intervals_TxRq = _interval_tiles(intervals, q, H // G)
  rows_T = _rows_of_tiles(query_TxGxRqxD, B)
  tables_Tx4 = _tables_of_tiles(intervals, key_BxKxGxD.shape[1], q, k)

  def tile(_, inputs):
    row, query_GxRqxD, intervals_Rq, table_4 = inputs

    def key_block(index, is_full, carry):
      out_GxRqxD, maximum_GxRq, sum_GxRq = carry
      key_GxkxD = load(key_rows, row, index, k)
      scores_GxRqxk = scale * _dot("GQD,GKD->GQK", query_GxRqxD, key_GxkxD)
      if soft_cap is not None:
        scores_GxRqxk = soft_cap * jnp.tanh(scores_GxRqxk / soft_cap)
      if not is_full:
        mask_Rqxk = _is_seen(intervals_Rq, index, k, keys_first=False)
        scores_GxRqxk = jnp.where(mask_Rqxk[None], scores_GxRqxk, -jnp.inf)
      new_maximum_GxRq = jnp.maximum(maximum_GxRq, jnp.max(scores_GxRqxk, axis=-1))
      weights_GxRqxk = jnp.exp(scores_GxRqxk - new_maximum_GxRq[..., None])
      decay_GxRq = jnp.exp(maximum_GxRq - new_maximum_GxRq)
      value_GxkxD = load(value_rows, row, index, k)
      out_GxRqxD = decay_GxRq[..., None] * out_GxRqxD + _dot(
        "GQK,GKD->GQD", weights_GxRqxk.astype(dtype), value_GxkxD
      )
      sum_GxRq = decay_GxRq * sum_GxRq + jnp.sum(weights_GxRqxk, axis=-1)
      return out_GxRqxD, new_maximum_GxRq, sum_GxRq

    zero_GxRq = jnp.zeros_like(query_GxRqxD[..., 0], jnp.float32)
    # Finite, because -inf - -inf is NaN.
    lowest_GxRq = jnp.full_like(zero_GxRq, jnp.finfo(jnp.float32).min)
    out_GxRqxD, maximum_GxRq, sum_GxRq = _over_key_blocks(
      table_4, key_block, (jnp.zeros_like(query_GxRqxD, jnp.float32), lowest_GxRq, zero_GxRq)
    )
    # Empty rows have collected the keys of full blocks.
    start_Rq, stop_Rq = intervals_Rq
    is_empty_Rq = stop_Rq <= start_Rq
    out_GxRqxD = jnp.where(is_empty_Rq[:, None], 0.0, out_GxRqxD)
    sum_GxRq = jnp.where(is_empty_Rq, 1.0, sum_GxRq)
    log_sum_exp_GxRq = jnp.where(is_empty_Rq, -jnp.inf, maximum_GxRq + jnp.log(sum_GxRq))
    return None, ((out_GxRqxD / sum_GxRq[..., None]).astype(out_dtype), log_sum_exp_GxRq)

  _, (out_TxGxRqxD, log_sum_exp_TxGxRq) = jax.lax.scan(
    tile, None, (rows_T, query_TxGxRqxD, intervals_TxRq, tables_Tx4)
  )
  out_BxQxHxD = _from_tiles(out_TxGxRqxD, B, Q, H)
  return out_BxQxHxD, _from_tiles(log_sum_exp_TxGxRq[..., None], B, Q, H)[..., 0]


def backward(
  query_BxQxHxD: jax.Array,
  key_BxKxGxD: jax.Array,
  value_BxKxGxD: jax.Array,
  intervals: KeyIntervals,
  log_sum_exp_BxQxH: jax.Array,
  delta_BxQxH: jax.Array,
  out_cotangent_BxQxHxD: jax.Array,
  *,
  scale: float,
  soft_cap: float | None,
  sizes: Mapping[str, tuple[int, int]] = {},
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `kernels.attention.backend.Backward`.

  Scores are stored keys first, [k, q]. Three of the four other products then need no transposed
  operand, and the fourth takes a key that is transposed once for all blocks.
  """
  B, Q, H, D = query_BxQxHxD.shape
  K, G = key_BxKxGxD.shape[1:3]
  dtype = query_BxQxHxD.dtype
  q, k = sizes.get("backward", (QUERY_BLOCK, KEY_BLOCK))
  q, k = _block(Q, q), _block(K, k)
  key_BxGxKxD = jnp.swapaxes(_pad(key_BxKxGxD, k), 1, 2)
  value_BxGxKxD = jnp.swapaxes(_pad(value_BxKxGxD, k), 1, 2)
  key_BxGxDxK = jnp.swapaxes(key_BxGxKxD, 2, 3)
  query_TxGxRqxD = _query_tiles(query_BxQxHxD, G, q)
  tiles = (
    _rows_of_tiles(query_TxGxRqxD, B),
    query_TxGxRqxD,
    _query_tiles(out_cotangent_BxQxHxD.astype(dtype), G, q),
    _query_tiles(log_sum_exp_BxQxH[..., None], G, q)[..., 0],
    _query_tiles(delta_BxQxH[..., None], G, q)[..., 0],
    _interval_tiles(intervals, q, H // G),
    _tables_of_tiles(intervals, K, q, k),
  )

  def tile(grads, inputs):
    row, query_GxRqxD, out_cotangent_GxRqxD, *rows, intervals_Rq, table_4 = inputs
    log_sum_exp_GxRq, delta_GxRq = rows

    def key_block(index, is_full, carry):
      query_grad_GxDxRq, key_grad_BxGxKxD, value_grad_BxGxKxD = carry
      key_GxkxD = _load(key_BxGxKxD, row, index, k)
      value_GxkxD = _load(value_BxGxKxD, row, index, k)
      scores_GxkxRq = scale * _dot("GKD,GQD->GKQ", key_GxkxD, query_GxRqxD)
      if soft_cap is not None:
        tanh_GxkxRq = jnp.tanh(scores_GxkxRq / soft_cap)
        scores_GxkxRq = soft_cap * tanh_GxkxRq
      exponents_GxkxRq = scores_GxkxRq - log_sum_exp_GxRq[:, None]
      if not is_full:
        mask_kxRq = _is_seen(intervals_Rq, index, k, keys_first=True)
        exponents_GxkxRq = jnp.where(mask_kxRq[None], exponents_GxkxRq, -jnp.inf)
      weights_GxkxRq = jnp.exp(exponents_GxkxRq)
      weights_cotangent_GxkxRq = _dot("GKD,GQD->GKQ", value_GxkxD, out_cotangent_GxRqxD)
      scores_grad_GxkxRq = weights_GxkxRq * (weights_cotangent_GxkxRq - delta_GxRq[:, None])
      if soft_cap is not None:
        scores_grad_GxkxRq *= 1 - tanh_GxkxRq**2
      scores_grad_GxkxRq = (scale * scores_grad_GxkxRq).astype(dtype)

      key_GxDxk = jax.lax.dynamic_slice(
        key_BxGxDxK, (row, 0, 0, index * k), (1, *key_BxGxDxK.shape[1:3], k)
      )[0]
      query_grad_GxDxRq += _dot("GDK,GKQ->GDQ", key_GxDxk, scores_grad_GxkxRq)
      key_grad_GxkxD = _dot("GKQ,GQD->GKD", scores_grad_GxkxRq, query_GxRqxD)
      value_grad_GxkxD = _dot("GKQ,GQD->GKD", weights_GxkxRq.astype(dtype), out_cotangent_GxRqxD)
      return (
        query_grad_GxDxRq,
        _add(key_grad_BxGxKxD, row, index, key_grad_GxkxD),
        _add(value_grad_BxGxKxD, row, index, value_grad_GxkxD),
      )

    query_grad_GxDxRq = jnp.swapaxes(jnp.zeros_like(query_GxRqxD, jnp.float32), 1, 2)
    query_grad_GxDxRq, *grads = _over_key_blocks(table_4, key_block, (query_grad_GxDxRq, *grads))
    return tuple(grads), jnp.swapaxes(query_grad_GxDxRq, 1, 2)

  zero_BxGxKxD = jnp.zeros_like(key_BxGxKxD, jnp.float32)
  (key_grad_BxGxKxD, value_grad_BxGxKxD), query_grad_TxGxRqxD = jax.lax.scan(
    tile, (zero_BxGxKxD, zero_BxGxKxD), tiles
  )
  return (
    _from_tiles(query_grad_TxGxRqxD, B, Q, H),
    jnp.swapaxes(key_grad_BxGxKxD, 1, 2)[:, :K],
    jnp.swapaxes(value_grad_BxGxKxD, 1, 2)[:, :K],
  )


XLA = Backend("xla", lambda query, key: None, forward, backward)


def _block(length: int, target: int) -> int:
  """The smallest equal blocks of at most `target` that cover `length`."""
  return -(-length // -(-length // target))


def _pad(array, block: int):
  """Pads axis 1 with zeros to whole blocks: with empty queries, or with keys that no row sees."""
  return jnp.pad(array, [(0, 0), (0, -array.shape[1] % block)] + [(0, 0)] * (array.ndim - 2))


def _query_tiles(array_BxQxHxD, G: int, q: int):
  """[T, G, R * q, D], with Q padded to whole blocks."""
  B, _, H, D = array_BxQxHxD.shape
  array_BxNxqxGxRxD = _pad(array_BxQxHxD, q).reshape(B, -1, q, G, H // G, D)
  return jnp.moveaxis(array_BxNxqxGxRxD, 2, 4).reshape(-1, G, H // G * q, D)


def _from_tiles(array_TxGxRqxD, B: int, Q: int, H: int):
  """The inverse of `_query_tiles`, without the padding."""
  T, G, Rq, D = array_TxGxRqxD.shape
  R = H // G
  array_BxNxGxRxqxD = array_TxGxRqxD.reshape(B, T // B, G, R, Rq // R, D)
  return jnp.moveaxis(array_BxNxGxRxqxD, 4, 2).reshape(B, -1, H, D)[:, :Q]


def _interval_tiles(intervals: KeyIntervals, q: int, R: int) -> KeyIntervals:
  """Starts and stops [T, R * q], in the order of `_query_tiles`. Padding rows are empty."""
  tiles = (jnp.tile(_pad(array, q).reshape(-1, q), (1, R)) for array in intervals)
  return KeyIntervals(*tiles)


def _rows_of_tiles(query_TxGxRqxD, B: int):
  """The batch row of each tile."""
  T = query_TxGxRqxD.shape[0]
  return jnp.arange(T, dtype=jnp.int32) // (T // B)


def _tables_of_tiles(intervals: KeyIntervals, num_keys: int, q: int, k: int):
  """The ranges of key blocks of each tile, int32 [T, 4]; see `block_tables.of_queries`."""
  tables_Bx4xN = block_tables.of_queries(intervals, num_keys, q, k)
  return jnp.swapaxes(tables_Bx4xN, 1, 2).reshape(-1, 4)


def _over_key_blocks(table_4, key_block: Callable, carry):
  """Folds `key_block(index, is_full, carry)` over the key blocks of a tile."""
  first, stop, full_first, full_stop = table_4

  def full(index, carry):
    return key_block(index, True, carry)

  def masked(number, carry):
    index = jnp.where(number < full_first, number, number + full_stop - full_first)
    return key_block(index, False, carry)

  carry = jax.lax.fori_loop(full_first, full_stop, full, carry)
  return jax.lax.fori_loop(first, stop - (full_stop - full_first), masked, carry)


def _is_seen(intervals_Rq: KeyIntervals, index, k: int, *, keys_first: bool):
  """Which keys of block `index` each query sees: [k, R * q] if `keys_first`, else [R * q, k]."""
  key_k = index * k + jnp.arange(k, dtype=jnp.int32)
  key, (start, stop) = key_k[None, :], (array_Rq[:, None] for array_Rq in intervals_Rq)
  if keys_first:
    key, start, stop = key.T, start.T, stop.T
  return (key >= start) & (key < stop)


def _load(array_BxGxKxD, row, index, k: int):
  _, G, _, D = array_BxGxKxD.shape
  return jax.lax.dynamic_slice(array_BxGxKxD, (row, 0, index * k, 0), (1, G, k, D))[0]


def _load_transposed(array_BxKxGxD, row, index, k: int):
  _, _, G, D = array_BxKxGxD.shape
  block_kxGxD = jax.lax.dynamic_slice(array_BxKxGxD, (row, index * k, 0, 0), (1, k, G, D))[0]
  return jnp.swapaxes(block_kxGxD, 0, 1)


def _add(array_BxGxKxD, row, index, block_GxkxD):
  k = block_GxkxD.shape[1]
  block_1xGxkxD = (_load(array_BxGxKxD, row, index, k) + block_GxkxD)[None]
  return jax.lax.dynamic_update_slice(array_BxGxKxD, block_1xGxkxD, (row, 0, index * k, 0))


def _dot(equation: str, left, right):
  return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
