"""Attention of a few query tokens to a cache: picks a backend, merges over devices.

L layers, B batch, Q query length, K cached positions on this device, H query heads, G key/value
heads, D head_dim.
"""

import jax
import jax.numpy as jnp

from kernels import backends
from kernels.attention import attention
from kernels.attention.intervals import KeyIntervals, within
from kernels.decode import cache as cache_lib
from kernels.decode.backend import Backend
from kernels.decode.cache import Cached
from kernels.decode.pallas_tpu import PALLAS_TPU
from kernels.decode.triton import TRITON
from kernels.decode.xla import XLA
from kernels.varying import vary_alike

# Query tokens; with more, as in reading a prompt, `attention` over one layer of the cache is best.
FEW = 8


# The best first. XLA takes everything.
BACKENDS = (PALLAS_TPU, TRITON, XLA)


def decode_attention(
  query_BxQxHxD: jax.Array,
  key_LxBxKxGxD: Cached,
  value_LxBxKxGxD: Cached,
  intervals: KeyIntervals,
  *,
  layer: jax.Array | int = 0,
  axis_names: tuple[str, ...] = (),
  scale: float | None = None,
  soft_cap: float | None = None,
  backend: str | Backend | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`kernels.attention.attention` to one layer of a cache, without a copy of that layer.

  Reads only the parts of the cache that meet an interval, and each once for all queries of a group
  (as in flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Has no gradient.

  With `axis_names`, call it inside `jax.shard_map`: every device attends to the positions that it
  holds, and three numbers of each query and head, not keys, are what merges (arXiv 2408.04093).

  Args:
    query_BxQxHxD: float32, bfloat16 or float16; the same on all devices of `axis_names`.
    key_LxBxKxGxD: of the query's dtype, or `Quantized`; G divides H.
    value_LxBxKxGxD: likewise.
    intervals: [B, Q], in global positions of the cache.
    layer: int32 scalar.
    axis_names: mesh axes that the cache's positions are sharded over, in equal, contiguous parts.
    scale: as in `attention`.
    soft_cap: as in `attention`.
    backend: "pallas_tpu" (TPUs), "triton" (NVIDIA GPUs), "xla" (runs everywhere), a Backend of your
      own, or None for the best here. More than a few query tokens take the best `attention`
      instead.

  Returns:
    (out [B, Q, H, D] in the query's dtype, log_sum_exp [B, Q, H] float32), the same on all devices
    of `axis_names`. A row with an empty interval has out 0 and log_sum_exp -inf.

  Raises:
    ValueError: no backend has this name, or it does not support the arguments.
  """
  if not isinstance(backend, Backend):
    few_BxQxHxD = query_BxQxHxD[:, :FEW]  # A backend gets no more.
    backend = backends.choose("decode", BACKENDS, backend, few_BxQxHxD, key_LxBxKxGxD)
  K, D = jax.tree.leaves(key_LxBxKxGxD)[0].shape[2], query_BxQxHxD.shape[3]
  scale = D**-0.5 if scale is None else scale
  offset = cache_lib.first_position(K, axis_names)
  arguments = query_BxQxHxD, key_LxBxKxGxD, value_LxBxKxGxD, jnp.asarray(layer), intervals
  leaves, structure = jax.tree.flatten(arguments)
  query, key, value, layer, intervals = structure.unflatten(vary_alike(*leaves))
  intervals = within(intervals, offset, K)
  if query.shape[1] <= FEW:
    out, log_sum_exp = backend.partial(
      query, key, value, layer, intervals, scale=scale, soft_cap=soft_cap
    )
  else:
    key, value = (
      cache_lib.dequantize(cache_lib.layer_of(cached, layer), query.dtype)
      for cached in (key, value)
    )
    out, log_sum_exp = attention(query, key, value, intervals, scale=scale, soft_cap=soft_cap)
  if axis_names:
    out, log_sum_exp = _merge_over(axis_names, out.astype(jnp.float32), log_sum_exp)
  return out.astype(query.dtype), log_sum_exp


def _merge_over(axis_names, out_BxQxHxD, log_sum_exp_BxQxH):
  """`kernels.attention.merge` over mesh axes: a maximum and one sum."""
  maximum_BxQxH = jax.lax.pmax(log_sum_exp_BxQxH, axis_names)
  is_empty_BxQxH = maximum_BxQxH == -jnp.inf
  maximum_BxQxH = jnp.where(is_empty_BxQxH, 0.0, maximum_BxQxH)
  weight_BxQxHx1 = jnp.exp(log_sum_exp_BxQxH - maximum_BxQxH)[..., None]
  sums = jnp.concatenate([weight_BxQxHx1 * out_BxQxHxD, weight_BxQxHx1], axis=-1)
  sums = jax.lax.psum(sums, axis_names)
  sum_BxQxH = jnp.where(is_empty_BxQxH, 1.0, sums[..., -1])
  log_sum_exp_BxQxH = jnp.where(is_empty_BxQxH, -jnp.inf, maximum_BxQxH + jnp.log(sum_BxQxH))
  return sums[..., :-1] / sum_BxQxH[..., None], log_sum_exp_BxQxH
