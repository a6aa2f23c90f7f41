"""RingAttention: exact attention over a sequence sharded over devices (arXiv 2310.01889).

Every device keeps its queries, their intervals and the result, while keys and values visit the
devices in turn. Three things differ from the original:

- There are n - 1 transfers, not n.
- Keys and values travel in their own dtype, while partial results stay float32 until the last
  merge, so that the error does not grow with the ring.
- A device skips each arriving chunk of keys that meets no interval of its queries.

B batch, Q query length per shard, H query heads, G key/value heads, D head_dim, n ring size,
C chunks per shard, L tokens per chunk (Q = C * L).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention import api, backend as backend_lib
from kernels.attention.intervals import KeyIntervals, within
from kernels.attention.merge import merge
from kernels.ring.layout import Layout
from kernels.varying import vary_alike


class _Ring(NamedTuple):
  """The static arguments of one call."""

  backend: backend_lib.Backend
  layout: Layout
  axis_name: str
  scale: float
  soft_cap: float | None

  @property
  def options(self) -> dict[str, Any]:
    """Keyword arguments of the backend's forward and backward."""
    return dict(scale=self.scale, soft_cap=self.soft_cap)

  def rotate(self, *arrays):
    """Sends to the next device; receives the shard of the previous one."""
    n = self.layout.ring_size
    return jax.lax.ppermute(arrays, self.axis_name, [(i, (i + 1) % n) for i in range(n)])

  def chunks(self, hop, *arrays):
    """Splits the shards held at a hop: int32 [C] chunk offsets, and the arrays [C, B, L, ...]."""
    n, C = self.layout.ring_size, self.layout.chunks_per_shard
    owner = (jax.lax.axis_index(self.axis_name) - hop) % n
    offsets_C = self.layout.chunk_offsets(owner, n * arrays[0].shape[1])
    return offsets_C, *(
      jnp.moveaxis(array.reshape(array.shape[0], C, -1, *array.shape[2:]), 1, 0) for array in arrays
    )


def ring_attention(
  query_BxQxHxD: jax.Array,
  key_BxQxGxD: jax.Array,
  value_BxQxGxD: jax.Array,
  intervals: KeyIntervals,
  *,
  layout: Layout,
  axis_name: str,
  soft_cap: float | None = None,
  backend: str | backend_lib.Backend | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`kernels.attention.attention` for a sequence that is sharded over a mesh axis.

  Call it inside `jax.shard_map`, which may also shard the batch and the heads over other axes.

  Args:
    query_BxQxHxD: this device's shard, in the order of `layout`.
    key_BxQxGxD: likewise; G divides H.
    value_BxQxGxD: likewise.
    intervals: for this device's queries, [B, Q], in global indices of the unpermuted keys.
    layout: which tokens each shard holds.
    axis_name: the mesh axis of the ring.
    soft_cap: as in `attention`.
    backend: as in `attention`, except "reference".

  Returns:
    (out [B, Q, H, D] in the query's dtype, log_sum_exp [B, Q, H] float32) for the local queries.

  Raises:
    ValueError: the layout's ring size differs from the size of the axis, or `attention` would
      raise.
  """
  axis_size = jax.lax.axis_size(axis_name)
  if layout.ring_size != axis_size:
    raise ValueError(
      f"The layout is for a ring of {layout.ring_size}, but mesh axis {axis_name!r} has "
      f"{axis_size} devices: make them equal."
    )
  if layout.ring_size == 1:
    return api.attention(
      query_BxQxHxD, key_BxQxGxD, value_BxQxGxD, intervals, soft_cap=soft_cap, backend=backend
    )
  api.check(query_BxQxHxD, key_BxQxGxD, value_BxQxGxD, intervals)
  backend = api.choose(backend, query_BxQxHxD, key_BxQxGxD)
  ring = _Ring(backend, layout, axis_name, query_BxQxHxD.shape[-1] ** -0.5, soft_cap)
  query, key, value, *bounds = vary_alike(query_BxQxHxD, key_BxQxGxD, value_BxQxGxD, *intervals)
  # Without the barrier, JAX moves everything that depends only on the intervals out of a scan over
  # layers, one copy per hop: 24 GiB at 32M tokens over 512 devices.
  query, *bounds = jax.lax.optimization_barrier((query, *bounds))
  return _attention(ring, query, key, value, KeyIntervals(*bounds))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ring: _Ring, query, key, value, intervals):
  n = ring.layout.ring_size

  def add_hop(hop, key, value, partial):
    """Merges attention over the keys held at this hop into the partial result."""

    def add_chunk(partial, chunk):
      offset, key_BxLxGxD, value_BxLxGxD = chunk
      local = within(intervals, offset, key_BxLxGxD.shape[1])

      def compute(partial):
        new = ring.backend.forward(
          query, key_BxLxGxD, value_BxLxGxD, local, out_dtype=jnp.float32, **ring.options
        )
        return merge([partial, new])

      return jax.lax.cond(_any_work(local), compute, lambda partial: partial, partial), None

    return jax.lax.scan(add_chunk, partial, ring.chunks(hop, key, value))[0]

  def step(carry, hop):
    key, value, partial = carry
    # The transfer starts before the hop's work, so that the two overlap.
    next_key, next_value = ring.rotate(key, value)
    return (next_key, next_value, add_hop(hop, key, value, partial)), None

  zero_BxQxHxD = jnp.zeros_like(query, jnp.float32)
  empty = (zero_BxQxHxD, jnp.full_like(zero_BxQxHxD[..., 0], -jnp.inf))
  (key, value, partial), _ = jax.lax.scan(step, (key, value, empty), jnp.arange(n - 1))
  out, log_sum_exp = add_hop(n - 1, key, value, partial)
  return out.astype(query.dtype), log_sum_exp


def _forward(ring, query, key, value, intervals):
  results = _attention.fun(ring, query, key, value, intervals)
  out, log_sum_exp = backend_lib.named_results(*results)
  return (out, log_sum_exp), (query, key, value, intervals, out, log_sum_exp)


def _backward(ring, residuals, cotangents):
  """Key and value gradients accumulate in float32 and travel one hop after their keys.

  Every transfer overlaps with work. While the first keys travel, a device computes the second half
  of its own keys, and while the last gradients return, the first half. (Under a causal mask the
  first half has three times the work, and float32 gradients have twice the bytes of keys.)
  """
  query, key, value, intervals, out, log_sum_exp = residuals
  n, half = ring.layout.ring_size, query.shape[1] // 2
  delta = backend_lib.delta(out, log_sum_exp, *cotangents)

  def grads_of_chunk(query_grad, chunk):
    """Adds to the query's gradient; returns it and the gradients of the chunk's key and value."""
    offset, key_BxLxGxD, value_BxLxGxD = chunk
    local = within(intervals, offset, key_BxLxGxD.shape[1])

    def compute(query_grad):
      new_query_grad, key_grad, value_grad = ring.backend.gradients(
        query, key_BxLxGxD, value_BxLxGxD, local, log_sum_exp, delta, cotangents[0], **ring.options
      )
      return query_grad + new_query_grad, (key_grad, value_grad)

    def skip(query_grad):
      zero = jnp.zeros_like(key_BxLxGxD, jnp.float32)
      return query_grad, (zero, zero)

    return jax.lax.cond(_any_work(local), compute, skip, query_grad)

  def grads_of_hop(hop, key, value, query_grad):
    query_grad, chunk_grads = jax.lax.scan(grads_of_chunk, query_grad, ring.chunks(hop, key, value))
    return query_grad, [jnp.moveaxis(grad, 0, 1).reshape(key.shape) for grad in chunk_grads]

  def grads_of_own(first, last, query_grad):
    """`grads_of_chunk` for the columns [first, last) of this device's keys, one half of them."""
    offsets_C, keys_CxBxLxGxD = ring.chunks(0, key)
    chunk, column = divmod(first, keys_CxBxLxGxD.shape[2])
    own = offsets_C[chunk] + column, key[:, first:last], value[:, first:last]
    return grads_of_chunk(query_grad, own)

  def step(carry, hop):
    key, value, *grads, query_grad = carry
    next_key, next_value = ring.rotate(key, value)
    grads = ring.rotate(*grads)
    query_grad, new_grads = grads_of_hop(hop, key, value, query_grad)
    return (next_key, next_value, *map(jnp.add, grads, new_grads), query_grad), None

  next_key, next_value = ring.rotate(key, value)
  query_grad = jnp.zeros_like(query, jnp.float32)
  query_grad, late_grads = grads_of_own(half, query.shape[1], query_grad)
  grads = [jnp.pad(grad, ((0, 0), (half, 0), (0, 0), (0, 0))) for grad in late_grads]
  # The last hop is outside the loop because it sends no keys.
  (key_there, value_there, *grads, query_grad), _ = jax.lax.scan(
    step, (next_key, next_value, *grads, query_grad), jnp.arange(1, n - 1)
  )
  grads = ring.rotate(*grads)
  query_grad, new_grads = grads_of_hop(n - 1, key_there, value_there, query_grad)
  grads = ring.rotate(*map(jnp.add, grads, new_grads))
  if half:  # A shard of one token has no first half.
    query_grad, early_grads = grads_of_own(0, half, query_grad)
    grads = [grad.at[:, :half].add(early) for grad, early in zip(grads, early_grads)]
  return *(grad.astype(query.dtype) for grad in (query_grad, *grads)), None


_attention.defvjp(_forward, _backward)


def _any_work(intervals: KeyIntervals) -> jax.Array:
  return jnp.any(intervals.stop_BxQ > intervals.start_BxQ)
