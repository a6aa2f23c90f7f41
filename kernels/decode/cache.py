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
  *,
  stripe: int | None = None,
  count_B: jax.Array | None = None,
) -> Cached:
  """Writes new tokens into one layer of a cache, starting at `position`; in place where XLA can.

  Args:
    cache_LxBxKxGxD: this device's positions. Inside `jax.shard_map`, with `axis_names`, the devices
      hold equal parts in the order of those axes.
    new_BxQxGxD: floats or `Quantized`, as the cache is; all new tokens, on every device.
    layer: int32 scalar.
    position: int32, the global position of the first new token: a scalar, or [B], one per row. All
      tokens that are written must fit in the cache.
    axis_names: the mesh axes that shard the positions.
    stripe: see `local_length`.
    count_B: int32; only the first count_B[b] tokens of row b are written. None: all.
  """
  K = cache_length(cache_LxBxKxGxD)
  Q = jax.tree.leaves(new_BxQxGxD)[0].shape[1]
  if not axis_names and count_B is None and jnp.ndim(position) == 0:
    return jax.tree.map(
      lambda old, new: jax.lax.dynamic_update_slice(
        old, new[None], [layer, 0, position] + [0] * (old.ndim - 3)
      ),
      cache_LxBxKxGxD,
      new_BxQxGxD,
    )
  stripe = K if stripe is None else stripe
  device, num_devices = _place(axis_names)
  period = stripe * num_devices
  # The most positions of one device among Q consecutive ones.
  num_places = min(K, Q // period * stripe + min(stripe, Q % period))

  def write_rows(cache, row, num_rows, position, count):
    """Writes to the rows [row, row + num_rows), which all begin at `position`."""
    first = local_length(position, K, axis_names, stripe)
    first = jnp.clip(first, 0, K - num_places)
    # A device rewrites as many positions as could be new, and keeps the old contents of the rest.
    place = first + jnp.arange(num_places, dtype=jnp.int32)
    token = place // stripe * period + device * stripe + place % stripe - position
    is_new = (token >= 0) & (token < count)
    token = jnp.clip(token, 0, Q - 1)

    def update(old, new):
      at = [layer, row, first] + [0] * (old.ndim - 3)
      held = jax.lax.dynamic_slice(old, at, (1, num_rows, num_places, *old.shape[3:]))[0]
      own = jax.lax.dynamic_slice_in_dim(new, row, num_rows, axis=0)
      chosen = is_new.reshape(1, -1, *(1,) * (old.ndim - 3))
      own = jnp.where(chosen, jnp.take(own, token, axis=1), held)
      return jax.lax.dynamic_update_slice(old, own[None], at)

    return jax.tree.map(update, cache, new_BxQxGxD)

  num_rows = jax.tree.leaves(new_BxQxGxD)[0].shape[0]
  if jnp.ndim(position) == 0 and count_B is None:
    return write_rows(cache_LxBxKxGxD, 0, num_rows, position, Q)
  zeros_B = jnp.zeros(num_rows, jnp.int32)
  position_B = zeros_B + position
  count_B = zeros_B + (Q if count_B is None else count_B)
  return jax.lax.fori_loop(
    0,
    num_rows,
    lambda row, cache: write_rows(cache, row, 1, position_B[row], count_B[row]),
    cache_LxBxKxGxD,
  )


def local_length(
  length: jax.Array | int, num_local: int, axis_names: tuple[str, ...], stripe: int | None = None
) -> jax.Array:
  """How many of the first `length` positions this device holds; they are its first ones.

  Args:
    length: int32, any shape; may lie outside the cache.
    num_local: K, the positions on every device.
    axis_names: the mesh axes that shard the positions; empty if the device holds all.
    stripe: the positions are dealt out to the devices in turn, this many at a time; it divides K.
      So all devices hold equal parts of a cache that is not full, and have equal work. None: each
      device holds contiguous positions.
  """
  stripe = num_local if stripe is None else stripe
  device, num_devices = _place(axis_names)
  rounds, rest = length // (stripe * num_devices), length % (stripe * num_devices)
  return jnp.clip(rounds * stripe + jnp.clip(rest - device * stripe, 0, stripe), 0, num_local)


def _place(axis_names: tuple[str, ...]) -> tuple[jax.Array | int, int]:
  """This device's index along the axes, and the number of devices."""
  if not axis_names:
    return 0, 1
  return jax.lax.axis_index(axis_names), jax.lax.axis_size(axis_names)


def layer_of(cache_LxBxKxGxD: Cached, layer: jax.Array | int) -> Cached:
  """One layer, [B, K, G, D]. XLA copies it unless it fuses the slice with what follows."""
  return jax.tree.map(
    lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), cache_LxBxKxGxD
  )


def cache_length(cache_LxBxKxGxD: Cached) -> int:
  """K, the positions on this device."""
  return jax.tree.leaves(cache_LxBxKxGxD)[0].shape[2]
