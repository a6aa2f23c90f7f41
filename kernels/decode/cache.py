"""Caches of keys or values: stacked over layers, maybe int8, maybe sharded along their positions.

L layers, B batch, Q new tokens, K cached positions on this device, G key/value heads, D head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Quantized(NamedTuple):
  """A cache of about half the bytes: x = value * scale, with one scale a position and head.

  Attributes:
    value: int8 [..., G, D], within -127..127.
    scale: float32 [..., G]. The error of an element is at most half of it, 1/254 of the largest
      magnitude of its head at its position.
  """

  value: jax.Array
  scale: jax.Array


# Kernels take caches of which each device holds a whole number of such stretches.
STRETCH = 128

# One of [L, B, K, G, D], as floats or int8.
Cached = jax.Array | Quantized


def whole_length(length: int, num_devices: int = 1) -> int:
  """Positions to allocate, so that any decode kernel can run: at least `length`."""
  return -(-length // (STRETCH * num_devices)) * STRETCH * num_devices


def quantize(array: jax.Array) -> Quantized:
  """Keys or values [..., G, D] in int8, rounded to nearest."""
  array = array.astype(jnp.float32)
  scale = jnp.max(jnp.abs(array), axis=-1) / 127
  inverse = jnp.where(scale == 0, 0.0, 1 / scale)
  return Quantized(jnp.round(array * inverse[..., None]).astype(jnp.int8), scale)


def dequantize(cached: Cached, dtype: jnp.dtype) -> jax.Array:
  """The numbers that a cache stands for, in `dtype`."""
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
  """The cache with new tokens from a position on, in place where XLA may.

  Args:
    cache_LxBxKxGxD: this device's positions: inside `jax.shard_map`, with `axis_names`, the
      devices hold equal, contiguous parts in the order of those axes.
    new_BxQxGxD: of the cache's own kind, whole on every device.
    layer: int32 scalar, the layer that they are of.
    position: int32 scalar, global, of the first of them; the last must have a place.
    axis_names: mesh axes that the positions are sharded over.
  """
  offset = first_position(_length(cache_LxBxKxGxD), axis_names)
  return jax.tree.map(
    lambda old, new: _write(old, new, layer, position - offset, bool(axis_names)),
    cache_LxBxKxGxD,
    new_BxQxGxD,
  )


def first_position(length: int, axis_names: tuple[str, ...]) -> jax.Array | int:
  """The global position of the first of `length` on this device."""
  return length * jax.lax.axis_index(axis_names) if axis_names else 0


def layer_of(cache_LxBxKxGxD: Cached, layer: jax.Array | int) -> Cached:
  """[B, K, G, D]; XLA copies it unless what follows fuses with it."""
  return jax.tree.map(
    lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), cache_LxBxKxGxD
  )


def _length(cache_LxBxKxGxD: Cached) -> int:
  return jax.tree.leaves(cache_LxBxKxGxD)[0].shape[2]


def _write(old, new, layer, position, is_sharded: bool):
  """One array [L, B, K, ...]; the position is local, and outside [0, K) on most devices."""
  K, Q = old.shape[2], new.shape[1]
  at = [layer, 0, position] + [0] * (old.ndim - 3)
  if is_sharded:
    # As many places as may receive something; those that do not keep what they hold.
    num_places = min(K, Q)
    at[2] = jnp.clip(position, 0, K - num_places)
    token = at[2] - position + jnp.arange(num_places)
    is_new = ((token >= 0) & (token < Q)).reshape(1, -1, *(1,) * (old.ndim - 3))
    held = jax.lax.dynamic_slice(old, at, (1, old.shape[1], num_places, *old.shape[3:]))[0]
    new = jnp.where(is_new, jnp.take(new, jnp.clip(token, 0, Q - 1), axis=1), held)
  return jax.lax.dynamic_update_slice(old, new[None], at)
