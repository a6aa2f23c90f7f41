"""The definition of linear cross-entropy, which materialises all logits.

N tokens, M model width, V vocabulary.
"""

import jax
import jax.numpy as jnp

# Disjoint ranges [start, stop) of vocabulary ids. A softmax runs over one of them.
Ranges = tuple[tuple[int, int], ...]


def statistics(
  hidden_NxM: jax.Array, head_MxV: jax.Array, targets_N: jax.Array, ranges: Ranges
) -> tuple[jax.Array, jax.Array]:
  """The log-sum-exp of the logits in each target's range, and the target's logit, float32 [N] each.

  Both are 0 for a target outside all ranges.
  """
  logits_NxV = jnp.dot(
    hidden_NxM, head_MxV.astype(hidden_NxM.dtype), preferred_element_type=jnp.float32
  )
  log_sum_exp_N = jnp.zeros(targets_N.shape, jnp.float32)
  target_logit_N = jnp.zeros(targets_N.shape, jnp.float32)
  for start, stop in ranges:
    member_N = (targets_N >= start) & (targets_N < stop)
    own_NxV = logits_NxV[:, start:stop]
    column_N = jnp.where(member_N, targets_N - start, 0)
    logit_N = jnp.take_along_axis(own_NxV, column_N[:, None], axis=1)[:, 0]
    log_sum_exp_N = jnp.where(member_N, jax.nn.logsumexp(own_NxV, axis=1), log_sum_exp_N)
    target_logit_N = jnp.where(member_N, logit_N, target_logit_N)
  return log_sum_exp_N, target_logit_N
