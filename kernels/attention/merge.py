"""Merges attention over parts of the keys into attention over all of them.

B batch, Q query length, H query heads, D head_dim, P partial results.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge(partials: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
  """Merges partial results by their log-sum-exp, in float32.

  Differentiable. Rows where some or all partial results are empty (log-sum-exp -inf) have exact
  values and gradients without NaN. Nothing overflows, whatever the log-sum-exps are.

  Args:
    partials: pairs (out [B, Q, H, D] in any float dtype, log_sum_exp [B, Q, H] float32) over
      disjoint sets of keys.

  Returns:
    (out [B, Q, H, D] float32, log_sum_exp [B, Q, H] float32) over all keys; the caller rounds
    `out` once, after the last merge.
  """
  log_sum_exp_PxBxQxH = jnp.stack([log_sum_exp for _, log_sum_exp in partials])
  weight_PxBxQxH, log_sum_exp_BxQxH = weights(log_sum_exp_PxBxQxH)
  out_BxQxHxD = sum(
    weight_BxQxH[..., None] * out.astype(jnp.float32)
    for weight_BxQxH, (out, _) in zip(weight_PxBxQxH, partials)
  )
  return out_BxQxHxD, log_sum_exp_BxQxH


def weights(log_sum_exp_PxBxQxH: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The weight of each partial `out` in `merge`, and the log-sum-exp over all keys.

  Args:
    log_sum_exp_PxBxQxH: float32, -inf where a row sees none of the keys of a partial result.

  Returns:
    ([P, B, Q, H], [B, Q, H]), both float32; a row without keys has weights 0.
  """
  maximum_BxQxH = jax.lax.stop_gradient(jnp.max(log_sum_exp_PxBxQxH, axis=0))
  is_empty_BxQxH = maximum_BxQxH == -jnp.inf
  maximum_BxQxH = jnp.where(is_empty_BxQxH, 0.0, maximum_BxQxH)
  weight_PxBxQxH = jnp.exp(log_sum_exp_PxBxQxH - maximum_BxQxH[None])
  sum_BxQxH = jnp.where(is_empty_BxQxH, 1.0, jnp.sum(weight_PxBxQxH, axis=0))
  log_sum_exp_BxQxH = jnp.where(is_empty_BxQxH, -jnp.inf, maximum_BxQxH + jnp.log(sum_BxQxH))
  return weight_PxBxQxH / sum_BxQxH[None], log_sum_exp_BxQxH
