"""The one entry to linear cross-entropy.

Shapes: N tokens, M model width, V vocabulary (the local columns where `axis_name` is given).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.cross_entropy import reference, xla
from kernels.cross_entropy.reference import Ranges
from kernels.varying import vary_alike


class TokenLosses(NamedTuple):
  """Per token, in nats; 0 where the target lies in no range.

  Attributes:
    loss_N: float32, -log_probability + z_loss * log_sum_exp**2.
    log_probability_N: float32, of the target among its range.
    log_sum_exp_N: float32, of the logits of that range.
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
  soft_cap: float | None = None,
  axis_name: str | None = None,
  backend: str = "xla",
) -> TokenLosses:
  """Softmax cross-entropy of `hidden @ head`, each target among the ids of the range that holds it.

  Memory is O(chunk x vocab_block + N x M + M x V), never O(N x V). Give tokens that carry no loss
  the target -1: they cost nothing, forward or backward. A token whose loss has cotangent 0 costs no
  backward work. All outputs are differentiable with respect to `hidden_NxM` and `head_MxV`.

  On a mesh, call it inside `jax.shard_map(..., check_vma=True)` with local tokens and the whole
  width M (N over data, fsdp and the sequence axes; flatten [B, S] there). With `axis_name`,
  `head_MxV` holds the shard's equal share of the columns; nothing but three float32 [N] vectors and
  the gradient of `hidden_NxM` crosses that axis, and the head's gradient is summed over the axes of
  the tokens.

  Args:
    hidden_NxM: float. Matrix products run in its dtype, accumulate in float32.
    head_MxV: float. Its gradient is accumulated in float32 and returned in its own dtype: pass
      float32 parameters uncast to keep it whole.
    targets_N: int32 ids.
    ranges: disjoint [start, stop) of ids; ((0, V),) for one softmax over all.
    chunk: tokens whose logits exist at a time.
    vocab_block: columns whose logits exist at a time, about.
    z_loss: weight of log_sum_exp**2 in the loss (PaLM, arXiv 2204.02311, section 5).
    soft_cap: logits become soft_cap * tanh(logits / soft_cap) if given (Gemma 2, arXiv 2408.00118).
    axis_name: mesh axis that the columns of the head are sharded over.
    backend: "xla", or "reference", which materialises the logits and takes no `axis_name`.

  Raises:
    ValueError: for an unknown backend, or "reference" with `axis_name`.
  """
  if backend == "reference" and axis_name is None:
    log_sum_exp_N, target_logit_N = reference.statistics(
      hidden_NxM, head_MxV, targets_N, ranges, soft_cap
    )
  elif backend == "xla":
    first_column = jnp.int32(0)
    if axis_name is not None:
      first_column = head_MxV.shape[1] * jax.lax.axis_index(axis_name)
    arrays = vary_alike(hidden_NxM, head_MxV, targets_N, first_column)
    log_sum_exp_N, target_logit_N = xla.statistics(*arrays, ranges, chunk, vocab_block, soft_cap)
    if axis_name is not None:
      # Of a target in no range every shard says 0, and these are no parts of one sum.
      log_sum_exp_N = jnp.where(
        _lies_in(targets_N, ranges), _log_sum_exp_over(log_sum_exp_N, axis_name), 0.0
      )
      target_logit_N = jax.lax.psum(target_logit_N, axis_name)
  else:
    raise ValueError(
      f"linear_cross_entropy: backend {backend!r} with axis_name={axis_name!r} does not exist; "
      "use 'xla', or 'reference' without an axis_name."
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
