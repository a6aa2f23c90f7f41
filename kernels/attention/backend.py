"""What an attention backend provides, and the one derivative rule that all of them share.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.attention.intervals import KeyIntervals

# What a remat policy saves so that the backward pass needs no second attention forward:
# `jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)`.
SAVED_NAMES = ("attention_out", "attention_log_sum_exp")


class Forward(Protocol):
  """Attention forward; `out` comes in `out_dtype`, so that a ring can merge unrounded partials."""

  def __call__(
    self,
    query_BxQxHxD: jax.Array,
    key_BxKxGxD: jax.Array,
    value_BxKxGxD: jax.Array,
    intervals: KeyIntervals,
    *,
    scale: float,
    soft_cap: float | None,
    out_dtype: jnp.dtype,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns out [B, Q, H, D] and log_sum_exp [B, Q, H] float32 (-inf in empty rows)."""


class Backward(Protocol):
  """Attention backward over any subset of the keys, given statistics over all of them.

  With p = exp(score - log_sum_exp): dvalue = p^T dout, dscore = p * (dout value^T - delta).
  """

  def __call__(
    self,
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
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of query, key and value in float32."""


class Backend(NamedTuple):
  """One implementation of attention over key intervals.

  `unsupported(query, key)` is a clause saying what stands against these shapes and dtypes on this
  platform and what would work, or None.
  """

  name: str
  unsupported: Callable[[jax.Array, jax.Array], str | None]
  forward: Forward
  backward: Backward

  def with_sizes(self, sizes: Mapping[str, Any]) -> "Backend":
    """The same with these block sizes, by kernel, where a table has others; for measuring them.

    Forward and backward of a backend that has a choice take `sizes` as their last argument.
    """
    return self._replace(
      forward=functools.partial(self.forward, sizes=sizes),
      backward=functools.partial(self.backward, sizes=sizes),
    )


def delta(
  out_BxQxHxD: jax.Array,
  log_sum_exp_BxQxH: jax.Array,
  out_cotangent_BxQxHxD: jax.Array,
  log_sum_exp_cotangent_BxQxH: jax.Array,
) -> jax.Array:
  """What `Backward` subtracts: sum(dout * out) - dlog_sum_exp [B, Q, H] float32, 0 if empty."""
  sum_BxQxH = jnp.sum(
    out_BxQxHxD.astype(jnp.float32) * out_cotangent_BxQxHxD.astype(jnp.float32), axis=-1
  )
  is_empty_BxQxH = log_sum_exp_BxQxH == -jnp.inf
  return jnp.where(is_empty_BxQxH, 0.0, sum_BxQxH - log_sum_exp_cotangent_BxQxH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def differentiable(backend: Backend, scale, soft_cap, query, key, value, intervals):
  """`backend.forward`, with `backend.backward` as its derivative."""
  return backend.forward(
    query, key, value, intervals, scale=scale, soft_cap=soft_cap, out_dtype=query.dtype
  )


def _forward(backend, scale, soft_cap, query, key, value, intervals):
  out, log_sum_exp = differentiable.fun(backend, scale, soft_cap, query, key, value, intervals)
  out = checkpoint_name(out, SAVED_NAMES[0])
  log_sum_exp = checkpoint_name(log_sum_exp, SAVED_NAMES[1])
  return (out, log_sum_exp), (query, key, value, intervals, out, log_sum_exp)


def _backward(backend, scale, soft_cap, residuals, cotangents):
  query, key, value, intervals, out, log_sum_exp = residuals
  grads = backend.backward(
    query,
    key,
    value,
    intervals,
    log_sum_exp,
    delta(out, log_sum_exp, *cotangents),
    cotangents[0],
    scale=scale,
    soft_cap=soft_cap,
  )
  return *(grad.astype(query.dtype) for grad in grads), None


differentiable.defvjp(_forward, _backward)
