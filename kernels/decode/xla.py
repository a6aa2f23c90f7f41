"""Decode in plain JAX. It runs everywhere and reads each cached key and value once, in place.

For every batch row, a loop runs over the blocks of the cache that meet an interval of its queries.
A block has enough keys to keep the device busy, and all queries of a group share a loaded key.
Nothing larger than a block is sliced, padded or transposed, because copying one layer of a cache of
a million positions would cost more than the attention.

L layers, B batch, Q query length, K cached positions, H query heads, G key/value heads, R = H / G,
D head_dim, k keys per block.
"""

import jax
import jax.numpy as jnp

from kernels.attention import block_tables
from kernels.attention.intervals import KeyIntervals
from kernels.decode.backend import Backend
from kernels.decode.cache import Cached, Quantized

# Keys per block, by platform. On CPUs a block fits into the cache of a core.
KEY_BLOCK = {"cpu": 512}
KEY_BLOCK_ELSEWHERE = 32 * 1024


def partial(
  query_BxQxHxD: jax.Array,
  key_LxBxKxGxD: Cached,
  value_LxBxKxGxD: Cached,
  layer: jax.Array,
  intervals: KeyIntervals,
  *,
  scale: float,
  soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """See `kernels.decode.backend.Partial`."""
  B, Q, H, D = query_BxQxHxD.shape
  K, G = jax.tree.leaves(key_LxBxKxGxD)[0].shape[2:4]
  k = min(K, KEY_BLOCK.get(jax.default_backend(), KEY_BLOCK_ELSEWHERE))
  dtype = query_BxQxHxD.dtype
  query_BxGxRxQxD = jnp.moveaxis(query_BxQxHxD.reshape(B, Q, G, H // G, D), 1, 3)
  blocks_Bx4 = block_tables.of_queries(intervals, K, Q, k)[..., 0]

  def row(_, inputs):
    row_index, query_GxRxQxD, (start_Q, stop_Q), blocks_4 = inputs

    def load(cached, begin):
      """A block as numbers [k, G, D] in the query's dtype, and scales float32 [G, 1, 1, k]."""
      block = jax.tree.map(
        lambda array: jax.lax.dynamic_slice(
          array, (layer, row_index, begin, *(0,) * (array.ndim - 3)), (1, 1, k, *array.shape[3:])
        )[0, 0],
        cached,
      )
      if isinstance(block, Quantized):
        return block.value.astype(dtype), block.scale.T[:, None, None]
      return block, 1.0

    def add_block(index, carry):
      out_GxRxQxD, maximum_GxRxQ, sum_GxRxQ = carry
      # If K is not a multiple of k, the last block starts earlier, to stay in bounds, and the mask
      # hides the keys that the previous block has counted.
      begin = jnp.minimum(index * k, K - k)
      key_kxGxD, key_scale = load(key_LxBxKxGxD, begin)
      scores_GxRxQxk = scale * key_scale * _dot("GRQD,KGD->GRQK", query_GxRxQxD, key_kxGxD)
      if soft_cap is not None:
        scores_GxRxQxk = soft_cap * jnp.tanh(scores_GxRxQxk / soft_cap)
      key_1xk = begin + jnp.arange(k, dtype=jnp.int32)[None]
      lower_Qx1 = jnp.maximum(start_Q, index * k)[:, None]
      is_seen_Qxk = (key_1xk >= lower_Qx1) & (key_1xk < stop_Q[:, None])
      scores_GxRxQxk = jnp.where(is_seen_Qxk[None, None], scores_GxRxQxk, -jnp.inf)
      new_maximum_GxRxQ = jnp.maximum(maximum_GxRxQ, jnp.max(scores_GxRxQxk, axis=-1))
      weights_GxRxQxk = jnp.exp(scores_GxRxQxk - new_maximum_GxRxQ[..., None])
      decay_GxRxQ = jnp.exp(maximum_GxRxQ - new_maximum_GxRxQ)
      sum_GxRxQ = decay_GxRxQ * sum_GxRxQ + jnp.sum(weights_GxRxQxk, axis=-1)
      value_kxGxD, value_scale = load(value_LxBxKxGxD, begin)
      weights_GxRxQxk = (weights_GxRxQxk * value_scale).astype(dtype)
      out_GxRxQxD = decay_GxRxQ[..., None] * out_GxRxQxD + _dot(
        "GRQK,KGD->GRQD", weights_GxRxQxk, value_kxGxD
      )
      return out_GxRxQxD, new_maximum_GxRxQ, sum_GxRxQ

    zero_GxRxQ = jnp.zeros_like(query_GxRxQxD[..., 0], jnp.float32)
    # Finite, because -inf - -inf is NaN. Rows that see no key keep a sum of 0.
    lowest_GxRxQ = jnp.full_like(zero_GxRxQ, jnp.finfo(jnp.float32).min)
    out_GxRxQxD, maximum_GxRxQ, sum_GxRxQ = jax.lax.fori_loop(
      blocks_4[block_tables.FIRST],
      blocks_4[block_tables.STOP],
      add_block,
      (jnp.zeros_like(query_GxRxQxD, jnp.float32), lowest_GxRxQ, zero_GxRxQ),
    )
    is_empty_GxRxQ = sum_GxRxQ == 0
    sum_GxRxQ = jnp.where(is_empty_GxRxQ, 1.0, sum_GxRxQ)
    log_sum_exp_GxRxQ = jnp.where(is_empty_GxRxQ, -jnp.inf, maximum_GxRxQ + jnp.log(sum_GxRxQ))
    return None, (out_GxRxQxD / sum_GxRxQ[..., None], log_sum_exp_GxRxQ)

  rows_B = jnp.zeros_like(intervals.start_BxQ[:, 0]) + jnp.arange(B, dtype=jnp.int32)
  _, (out_BxGxRxQxD, log_sum_exp_BxGxRxQ) = jax.lax.scan(
    row, None, (rows_B, query_BxGxRxQxD, intervals, blocks_Bx4)
  )
  out_BxQxHxD = jnp.moveaxis(out_BxGxRxQxD, 3, 1).reshape(B, Q, H, D)
  return out_BxQxHxD, jnp.moveaxis(log_sum_exp_BxGxRxQ, 3, 1).reshape(B, Q, H)


def _dot(equation: str, left, right):
  return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


XLA = Backend("xla", lambda query, key: None, partial)
