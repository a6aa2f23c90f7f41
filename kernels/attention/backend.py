"""What an attention backend provides, and the derivative rule that all backends share.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.attention.intervals import KeyIntervals

# A rematerialisation policy that saves these names needs no second attention forward in the
# backward pass: `jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)`.
SAVED_NAMES = ("attention_out", "attention_log_sum_exp")


class Forward(Protocol):
  """Attention forward. `out` has the dtype `out_dtype`, so that a ring merges unrounded results."""

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
  `log_sum_exp_BxQxH` is +inf in rows whose interval is empty, so that their weights are 0.
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
  """One implementation of attention over key intervals; see `kernels.backends.Backend`."""

  name: str
  unsupported: Callable[[Any, Any], str | None]
  forward: Forward
  backward: Backward

  def gradients(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    intervals: KeyIntervals,
    log_sum_exp_BxQxH: jax.Array,
    *rest: jax.Array,
    **options: Any,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`backward` with the log_sum_exp that `forward` returns, over at least these keys.

    Rows that see none of these keys may see others, and then have a finite log_sum_exp.
    """
    is_empty_BxQx1 = (intervals.stop_BxQ <= intervals.start_BxQ)[..., None]
    log_sum_exp_BxQxH = jnp.where(is_empty_BxQx1, jnp.inf, log_sum_exp_BxQxH)
    return self.backward(query, key, value, intervals, log_sum_exp_BxQxH, *rest, **options)

  def with_sizes(self, sizes: Mapping[str, Any]) -> "Backend":
    """The same backend with other block sizes than its table's, by kernel, to measure them.

    A backend with a choice of sizes takes `sizes` as an argument of forward and backward.
    """
    return self._replace(
      forward=functools.partial(cast(Any, self.forward), sizes=sizes),
      backward=functools.partial(cast(Any, self.backward), sizes=sizes),
    )


def delta(
  out_BxQxHxD: jax.Array,
  log_sum_exp_BxQxH: jax.Array,
  out_cotangent_BxQxHxD: jax.Array,
  log_sum_exp_cotangent_BxQxH: jax.Array,
) -> jax.Array:
  """The `delta` of `Backward`: sum(dout * out) - dlog_sum_exp, float32 [B, Q, H], 0 if empty."""
  sum_BxQxH = jnp.sum(
    out_BxQxHxD.astype(jnp.float32) * out_cotangent_BxQxHxD.astype(jnp.float32), axis=-1
  )
  is_empty_BxQxH = log_sum_exp_BxQxH == -jnp.inf
  return jnp.where(is_empty_BxQxH, 0.0, sum_BxQxH - log_sum_exp_cotangent_BxQxH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def differentiable(
  backend: Backend,
  scale: float,
  soft_cap: float | None,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  intervals: KeyIntervals,
) -> tuple[jax.Array, jax.Array]:
  """`backend.forward`, with `backend.backward` as its derivative."""
  return backend.forward(
    query, key, value, intervals, scale=scale, soft_cap=soft_cap, out_dtype=query.dtype
  )


def _forward(backend, scale, soft_cap, query, key, value, intervals):
  results = differentiable.fun(backend, scale, soft_cap, query, key, value, intervals)
  out, log_sum_exp = named_results(*results)
  return (out, log_sum_exp), (query, key, value, intervals, out, log_sum_exp)


def named_results(out: jax.Array, log_sum_exp: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The results of attention under `SAVED_NAMES`."""
  return checkpoint_name(out, SAVED_NAMES[0]), checkpoint_name(log_sum_exp, SAVED_NAMES[1])


def _backward(backend, scale, soft_cap, residuals, cotangents):
  query, key, value, intervals, out, log_sum_exp = residuals
  statistics = log_sum_exp, delta(out, log_sum_exp, *cotangents), cotangents[0]
  grads = backend.gradients(
    query, key, value, intervals, *statistics, scale=scale, soft_cap=soft_cap
  )
  return *(grad.astype(query.dtype) for grad in grads), None


differentiable.defvjp(_forward, _backward)
