"""The entry to attention of a few query tokens to a cache: picks a backend, merges over devices.

L layers, B batch, Q query length, K cached positions on this device, H query heads, G key/value
heads, D head_dim.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from kernels import backends
from kernels.attention import attention
from kernels.attention.intervals import KeyIntervals
from kernels.decode import cache as cache_lib
from kernels.decode.backend import Backend
from kernels.decode.cache import Cached
from kernels.decode.pallas_tpu import PALLAS_TPU
from kernels.decode.triton import TRITON
from kernels.decode.xla import XLA
from kernels.varying import vary_alike

# The most query tokens for a decode backend. For more, as when reading a prompt, `attention` over
# one layer of the cache is faster.
FEW = 8
# The best first. XLA supports everything.
BACKENDS = (PALLAS_TPU, TRITON, XLA)


def decode_attention(
  query_BxQxHxD: jax.Array,
  key_LxBxKxGxD: Cached,
  value_LxBxKxGxD: Cached,
  intervals: KeyIntervals,
  *,
  layer: jax.Array | int = 0,
  axis_names: tuple[str, ...] = (),
  stripe: int | None = None,
  query_axes: tuple[str, ...] = (),
  soft_cap: float | None = None,
  backend: str | Backend | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`kernels.attention.attention` to one layer of a cache, without copying that layer.

  Reads only the parts of the cache that meet an interval, each once for all query heads of a group
  (as in flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). It has no
  gradient.

  With `axis_names`, call it inside `jax.shard_map`. Every device then attends to the positions that
  it holds, and the devices exchange results and statistics, never keys (arXiv 2408.04093).

  Args:
    query_BxQxHxD: float32, bfloat16 or float16; the same on all devices of `axis_names`.
    key_LxBxKxGxD: in the query's dtype, or `Quantized`; G divides H.
    value_LxBxKxGxD: likewise.
    intervals: [B, Q], in global positions of the cache.
    layer: int32 scalar.
    axis_names: the mesh axes that shard the positions of the cache, in equal parts.
    stripe: how the positions are dealt out to the devices; see `kernels.decode.local_length`.
    query_axes: some of `axis_names`, over which the result is divided: each device gets the result
      of its equal part of the queries.
    soft_cap: as in `attention`.
    backend: "pallas_tpu" (TPU), "triton" (NVIDIA GPUs), "xla" (runs everywhere), your own
      `Backend`, or None for the best on this platform. More than FEW query tokens use the best
      backend of `attention` instead.

  Returns:
    (out [B, Q, H, D] in the query's dtype, log_sum_exp [B, Q, H] float32), the same on all devices
    of `axis_names`; with `query_axes`, a part of both along Q. A row with an empty interval has
    out 0 and log_sum_exp -inf.

  Raises:
    ValueError: no backend has this name, or it does not support the arguments.
  """
  if not isinstance(backend, Backend):
    few_BxQxHxD = query_BxQxHxD[:, :FEW]  # A backend never gets more.
    backend = backends.choose("decode", BACKENDS, backend, few_BxQxHxD, key_LxBxKxGxD)
  K, D = cache_lib.cache_length(key_LxBxKxGxD), query_BxQxHxD.shape[3]
  arguments = query_BxQxHxD, key_LxBxKxGxD, value_LxBxKxGxD, jnp.asarray(layer), intervals
  leaves, structure = jax.tree.flatten(arguments)
  query, key, value, index, intervals = jax.tree.unflatten(structure, vary_alike(*leaves))
  intervals = KeyIntervals(
    *(cache_lib.local_length(bound, K, axis_names, stripe) for bound in intervals)
  )
  if query.shape[1] <= FEW:
    out, log_sum_exp = backend.partial(
      query, key, value, index, intervals, scale=D**-0.5, soft_cap=soft_cap
    )
  else:
    key, value = (
      cache_lib.dequantize(jax.tree.map(_row_major, cache_lib.layer_of(cached, index)), query.dtype)
      for cached in (key, value)
    )
    out, log_sum_exp = attention(query, key, value, intervals, soft_cap=soft_cap)
  if axis_names:
    out, log_sum_exp = _merge_over(axis_names, query_axes, out.astype(jnp.float32), log_sum_exp)
  return out.astype(query.dtype), log_sum_exp


def _row_major(layer_BxKxG: jax.Array) -> jax.Array:
  """One layer of a cache, in the layout of its type.

  Kernels transpose what they read. XLA would otherwise transpose the whole cache before a loop over
  layers, instead of one layer at a time.
  """
  return with_layout_constraint(layer_BxKxG, Layout(tuple(range(layer_BxKxG.ndim))))


def _merge_over(axis_names, query_axes, out_BxQxHxD, log_sum_exp_BxQxH):
  """`kernels.attention.merge` over mesh axes, by one maximum and one sum."""
  maximum_BxQxH = jax.lax.pmax(log_sum_exp_BxQxH, axis_names)
  is_empty_BxQxH = maximum_BxQxH == -jnp.inf
  maximum_BxQxH = jnp.where(is_empty_BxQxH, 0.0, maximum_BxQxH)
  weight_BxQxHx1 = jnp.exp(log_sum_exp_BxQxH - maximum_BxQxH)[..., None]
  sums = jnp.concatenate([weight_BxQxHx1 * out_BxQxHxD, weight_BxQxHx1], axis=-1)
  summed_axes = tuple(axis for axis in axis_names if axis not in query_axes)
  if query_axes:
    sums = jax.lax.psum_scatter(sums, query_axes, scatter_dimension=1, tiled=True)
    num_own = sums.shape[1]
    first = jax.lax.axis_index(query_axes) * num_own
    maximum_BxQxH, is_empty_BxQxH = (
      jax.lax.dynamic_slice_in_dim(array, first, num_own, axis=1)
      for array in (maximum_BxQxH, is_empty_BxQxH)
    )
  sums = jax.lax.psum(sums, summed_axes) if summed_axes else sums
  sum_BxQxH = jnp.where(is_empty_BxQxH, 1.0, sums[..., -1])
  log_sum_exp_BxQxH = jnp.where(is_empty_BxQxH, -jnp.inf, maximum_BxQxH + jnp.log(sum_BxQxH))
  return sums[..., :-1] / sum_BxQxH[..., None], log_sum_exp_BxQxH
