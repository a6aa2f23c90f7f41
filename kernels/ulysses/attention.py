"""Ulysses within a ring: exact attention for a sequence sharded over two mesh axes.

The devices of the `ulysses` axis exchange heads for tokens by an all-to-all (DeepSpeed Ulysses,
arXiv 2309.14509). Each then holds all tokens of a ring shard for some of the heads, and the ring
runs for those heads (USP, arXiv 2405.07719). The exchange moves each token once, whatever the
length. The ring hides its transfers behind work, of which it needs enough.

The columns of the sequence are sharded over (ring, ulysses), ring first: the ulysses devices of one
ring shard hold its columns in order, so `Layout` and its permutation do not depend on ulysses.

B batch, Q query length per device, u ulysses size, S = u * Q tokens per ring shard, H query heads,
G key/value heads, D head_dim.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kernels.attention import api
from kernels.attention.backend import Backend
from kernels.attention.intervals import KeyIntervals
from kernels.ring.attention import ring_attention
from kernels.ring.layout import Layout


def ulysses_attention(
  query_BxQxHxD: jax.Array,
  key_BxQxGxD: jax.Array,
  value_BxQxGxD: jax.Array,
  intervals: KeyIntervals,
  *,
  layout: Layout,
  ring_axis: str,
  ulysses_axis: str,
  soft_cap: float | None = None,
  backend: str | Backend | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`kernels.attention.attention` for a sequence sharded over two mesh axes, each of any size.

  Call it inside `jax.shard_map`, which may also shard the batch and the heads over other axes. If
  the ulysses size does not divide the number of key/value heads, they are repeated until it does.
  The gradients of the copies are summed in float32.

  Args:
    query_BxQxHxD: this device's columns, in the order of `layout`; H counts this device's heads
      before the exchange.
    key_BxQxGxD: likewise; G divides H.
    value_BxQxGxD: likewise.
    intervals: for this device's queries, [B, Q], in global indices of the unpermuted keys.
    layout: which tokens each ring shard holds.
    ring_axis: the mesh axis of the ring, the outer one of the sequence.
    ulysses_axis: the mesh axis of the exchange, the inner one.
    soft_cap: as in `attention`.
    backend: as in `ring_attention`.

  Returns:
    (out [B, Q, H, D] in the query's dtype, log_sum_exp [B, Q, H] float32) for the local queries.

  Raises:
    ValueError: the ulysses size does not divide H, or `ring_attention` would raise.
  """
  ring = functools.partial(
    ring_attention, layout=layout, axis_name=ring_axis, soft_cap=soft_cap, backend=backend
  )
  u = jax.lax.axis_size(ulysses_axis)
  if u == 1:
    return ring(query_BxQxHxD, key_BxQxGxD, value_BxQxGxD, intervals)
  api.check(query_BxQxHxD, key_BxQxGxD, value_BxQxGxD, intervals)
  H = query_BxQxHxD.shape[2]
  if H % u:
    raise ValueError(
      f"{H} query heads per device do not divide over the {u} devices of mesh axis "
      f"{ulysses_axis!r}: make that axis smaller and the ring larger."
    )
  heads_to_tokens = functools.partial(
    jax.lax.all_to_all, axis_name=ulysses_axis, split_axis=2, concat_axis=1, tiled=True
  )
  tokens_to_heads = functools.partial(
    jax.lax.all_to_all, axis_name=ulysses_axis, split_axis=1, concat_axis=2, tiled=True
  )
  out_BxSxHxD, log_sum_exp_BxSxH = ring(
    heads_to_tokens(query_BxQxHxD),
    heads_to_tokens(_repeat_heads(key_BxQxGxD, u)),
    heads_to_tokens(_repeat_heads(value_BxQxGxD, u)),
    KeyIntervals(
      *(jax.lax.all_gather(array, ulysses_axis, axis=1, tiled=True) for array in intervals)
    ),
  )
  return tokens_to_heads(out_BxSxHxD), tokens_to_heads(log_sum_exp_BxSxH)


def _repeat_heads(array_BxQxGxD: jax.Array, u: int) -> jax.Array:
  """Repeats each head so that their number becomes lcm(G, u), which still divides H."""
  times = math.lcm(array_BxQxGxD.shape[2], u) // array_BxQxGxD.shape[2]
  # The cast is exact, and makes the transpose sum the cotangents in float32.
  wide_BxQxGxD = array_BxQxGxD.astype(jnp.float32)
  return jnp.repeat(wide_BxQxGxD, times, axis=2).astype(array_BxQxGxD.dtype)
