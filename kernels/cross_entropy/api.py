"""The entry to linear cross-entropy.

N tokens, M model width, V vocabulary (the local columns, if `axis_name` is given).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.cross_entropy import reference, xla
from kernels.cross_entropy.reference import Ranges
from kernels.varying import vary_alike


class TokenLosses(NamedTuple):
  """Per-token results in nats, float32; 0 for targets outside all ranges.

  Attributes:
    loss_N: -log_probability + z_loss * log_sum_exp**2.
    log_probability_N: the log-probability of the target within its range.
    log_sum_exp_N: the log-sum-exp of the logits in that range.
  """

  loss_N: jax.Array
  log_probability_N: jax.Array
  log_sum_exp_N: jax.Array


def linear_cross_entropy(
  hidden_NxM: jax.Array,
  head_MxV: jax.Array,
  targets_N: jax.Array,
  *,
  ranges: Ranges,
  chunk: int = 1024,
  vocab_block: int = 4096,
  z_loss: float = 0.0,
  axis_name: str | None = None,
  backend: str = "xla",
) -> TokenLosses:
  """Softmax cross-entropy of `hidden @ head`, for each target over the range of ids that holds it.

  Memory is O(chunk x vocab_block + N x M + M x V), never O(N x V). Tokens without loss should have
  the target -1: they cost nothing, forward or backward. A token whose loss has cotangent 0 costs no
  backward work. All outputs are differentiable with respect to `hidden_NxM` and `head_MxV`.

  On a mesh, call it inside `jax.shard_map(..., check_vma=True)`, with local tokens (flatten the
  local [B, S]) and the whole width M. With `axis_name`, `head_MxV` is this device's equal share of
  the columns. Only three float32 [N] vectors and the gradient of `hidden_NxM` cross that axis. The
  gradient of the head is summed over the axes of the tokens.

  Args:
    hidden_NxM: float. Matrix products run in its dtype and accumulate in float32.
    head_MxV: float. Its gradient accumulates in float32 and is returned in the dtype of `head_MxV`:
      pass float32 parameters without a cast to keep the precision.
    targets_N: int32 ids.
    ranges: disjoint ranges [start, stop) of ids; ((0, V),) for one softmax over all ids.
    chunk: number of tokens whose logits exist at a time.
    vocab_block: approximate number of columns whose logits exist at a time.
    z_loss: weight of log_sum_exp**2 in the loss (PaLM, arXiv 2204.02311, section 5).
    axis_name: the mesh axis that shards the columns of the head.
    backend: "xla", or "reference", which materialises the logits and takes no `axis_name`.

  Raises:
    ValueError: for an unknown backend, or "reference" with `axis_name`.
  """
  if backend == "reference" and axis_name is None:
    log_sum_exp_N, target_logit_N = reference.statistics(hidden_NxM, head_MxV, targets_N, ranges)
  elif backend == "xla":
    first_column = jnp.int32(0)
    if axis_name is not None:
      first_column = head_MxV.shape[1] * jax.lax.axis_index(axis_name)
    arrays = vary_alike(hidden_NxM, head_MxV, targets_N, first_column)
    log_sum_exp_N, target_logit_N = xla.statistics(*arrays, ranges, chunk, vocab_block)
    if axis_name is not None:
      # For a target outside all ranges, every device returns 0, which is not a part of a sum.
      log_sum_exp_N = jnp.where(
        _lies_in(targets_N, ranges), _log_sum_exp_over(log_sum_exp_N, axis_name), 0.0
      )
      target_logit_N = jax.lax.psum(target_logit_N, axis_name)
  else:
    raise ValueError(
      f"linear_cross_entropy has no backend {backend!r} with axis_name={axis_name!r}: use 'xla', "
      "or 'reference' without an axis_name."
    )
  log_probability_N = target_logit_N - log_sum_exp_N
  loss_N = z_loss * jnp.square(log_sum_exp_N) - log_probability_N
  return TokenLosses(loss_N, log_probability_N, log_sum_exp_N)


def _lies_in(targets_N: jax.Array, ranges: Ranges) -> jax.Array:
  lies_N = jnp.zeros_like(targets_N, jnp.bool_)
  for start, stop in ranges:
    lies_N |= (targets_N >= start) & (targets_N < stop)
  return lies_N


def _log_sum_exp_over(log_sum_exp_N: jax.Array, axis_name: str) -> jax.Array:
  maximum_N = jax.lax.pmax(jax.lax.stop_gradient(log_sum_exp_N), axis_name)
  return maximum_N + jnp.log(jax.lax.psum(jnp.exp(log_sum_exp_N - maximum_N), axis_name))
