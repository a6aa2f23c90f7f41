"""The definition of attention over key intervals. It is short and needs O(S^2) memory.

B batch, Q/K query/key length, H query heads, G key/value heads, R = H / G, D head_dim.
"""

import jax
import jax.numpy as jnp

from kernels.attention import intervals as intervals_lib


def attention(
  query_BxQxHxD: jax.Array,
  key_BxKxGxD: jax.Array,
  value_BxKxGxD: jax.Array,
  intervals: intervals_lib.KeyIntervals,
  *,
  scale: float,
  soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """softmax(cap(scale * query . key)) . value in float32; see `kernels.attention.attention`."""
  B, Q, H, D = query_BxQxHxD.shape
  K, G = key_BxKxGxD.shape[1:3]
  query_BxQxGxRxD = query_BxQxHxD.reshape(B, Q, G, H // G, D).astype(jnp.float32)
  scores_BxGxRxQxK = scale * jnp.einsum(
    "BQGRD,BKGD->BGRQK", query_BxQxGxRxD, key_BxKxGxD.astype(jnp.float32), precision="highest"
  )
  if soft_cap is not None:
    scores_BxGxRxQxK = soft_cap * jnp.tanh(scores_BxGxRxQxK / soft_cap)
  mask_Bx1x1xQxK = intervals_lib.mask(intervals, K)[:, None, None]
  scores_BxGxRxQxK = jnp.where(mask_Bx1x1xQxK, scores_BxGxRxQxK, -jnp.inf)

  maximum_BxGxRxQ = jax.lax.stop_gradient(jnp.max(scores_BxGxRxQxK, axis=-1))
  is_empty_BxGxRxQ = maximum_BxGxRxQ == -jnp.inf
  maximum_BxGxRxQ = jnp.where(is_empty_BxGxRxQ, 0.0, maximum_BxGxRxQ)
  weights_BxGxRxQxK = jnp.exp(scores_BxGxRxQxK - maximum_BxGxRxQ[..., None])
  # A sum of 1 in empty rows keeps the division and the logarithm differentiable.
  sum_BxGxRxQ = jnp.where(is_empty_BxGxRxQ, 1.0, jnp.sum(weights_BxGxRxQxK, axis=-1))
  out_BxQxGxRxD = jnp.einsum(
    "BGRQK,BKGD->BQGRD",
    weights_BxGxRxQxK / sum_BxGxRxQ[..., None],
    value_BxKxGxD.astype(jnp.float32),
    precision="highest",
  )
  log_sum_exp_BxGxRxQ = jnp.where(
    is_empty_BxGxRxQ, -jnp.inf, maximum_BxGxRxQ + jnp.log(sum_BxGxRxQ)
  )
  return (
    out_BxQxGxRxD.reshape(B, Q, H, D).astype(query_BxQxHxD.dtype),
    jnp.moveaxis(log_sum_exp_BxGxRxQ, 3, 1).reshape(B, Q, H),
  )
