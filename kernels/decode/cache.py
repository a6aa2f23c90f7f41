"""Caches of keys or values: stacked over layers, optionally int8, optionally sharded by position.

L layers, B batch, Q new tokens, K cached positions on this device, G key/value heads, D head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Quantized(NamedTuple):
  """An int8 cache, about half the bytes of bfloat16: x = value * scale.

  Attributes:
    value: int8 [..., G, D], within -127..127.
    scale: float32 [..., G], one per position and head. The error of an element is at most half of
      it, which is 1/254 of the largest magnitude of its head at its position.
  """

  value: jax.Array
  scale: jax.Array


# Kernels need a cache where each device holds a multiple of this number of positions.
STRETCH = 128

# A cache [L, B, K, G, D], as floats or int8.
Cached = jax.Array | Quantized


def whole_length(length: int, num_devices: int = 1) -> int:
  """Positions to allocate for at least `length`, so that any decode kernel can run."""
  return -(-length // (STRETCH * num_devices)) * STRETCH * num_devices


def quantize(array: jax.Array) -> Quantized:
  """Rounds keys or values [..., G, D] to the nearest int8 values."""
  array = array.astype(jnp.float32)
  scale = jnp.max(jnp.abs(array), axis=-1) / 127
  inverse = jnp.where(scale == 0, 0.0, 1 / scale)
  return Quantized(jnp.round(array * inverse[..., None]).astype(jnp.int8), scale)


def dequantize(cached: Cached, dtype: jnp.dtype) -> jax.Array:
  """Returns the numbers that a cache represents, in `dtype`."""
  if not isinstance(cached, Quantized):
    return cached.astype(dtype)
  return (cached.value.astype(jnp.float32) * cached.scale[..., None]).astype(dtype)


def write(
  cache_LxBxKxGxD: Cached,
  new_BxQxGxD: Cached,
  layer: jax.Array | int,
  position: jax.Array | int,
  axis_names: tuple[str, ...] = (),
) -> Cached:
  """Writes new tokens into one layer of a cache, starting at `position`; in place where XLA can.

  Args:
    cache_LxBxKxGxD: this device's positions. Inside `jax.shard_map`, with `axis_names`, the devices
      hold equal, contiguous parts in the order of those axes.
    new_BxQxGxD: floats or `Quantized`, as the cache is; all new tokens, on every device.
    layer: int32 scalar.
    position: int32 scalar, the global position of the first new token. All must fit in the cache.
    axis_names: the mesh axes that shard the positions.
  """
  offset = first_position(cache_length(cache_LxBxKxGxD), axis_names)
  return jax.tree.map(
    lambda old, new: _write(old, new, layer, position - offset, bool(axis_names)),
    cache_LxBxKxGxD,
    new_BxQxGxD,
  )


def first_position(length: int, axis_names: tuple[str, ...]) -> jax.Array | int:
  """The global position of this device's first position, if every device holds `length`."""
  return length * jax.lax.axis_index(axis_names) if axis_names else 0


def layer_of(cache_LxBxKxGxD: Cached, layer: jax.Array | int) -> Cached:
  """One layer, [B, K, G, D]. XLA copies it unless it fuses the slice with what follows."""
  return jax.tree.map(
    lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), cache_LxBxKxGxD
  )


def cache_length(cache_LxBxKxGxD: Cached) -> int:
  """K, the positions on this device."""
  return jax.tree.leaves(cache_LxBxKxGxD)[0].shape[2]


def _write(old, new, layer, position, is_sharded: bool):
  """`write` for one array [L, B, K, ...]; the local `position` may be outside [0, K)."""
  K, Q = old.shape[2], new.shape[1]
  at = [layer, 0, position] + [0] * (old.ndim - 3)
  if is_sharded:
    # A device rewrites as many positions as could be new, and keeps the old contents of the rest.
    num_places = min(K, Q)
    at[2] = jnp.clip(position, 0, K - num_places)
    token = at[2] - position + jnp.arange(num_places)
    is_new = ((token >= 0) & (token < Q)).reshape(1, -1, *(1,) * (old.ndim - 3))
    held = jax.lax.dynamic_slice(old, at, (1, old.shape[1], num_places, *old.shape[3:]))[0]
    new = jnp.where(is_new, jnp.take(new, jnp.clip(token, 0, Q - 1), axis=1), held)
  return jax.lax.dynamic_update_slice(old, new[None], at)
