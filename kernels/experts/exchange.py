"""Sends rows to the devices of their experts and back, inside `jax.shard_map`.

n devices of the mesh axes, R rows to send, N rows with those that arrive, L rows per device.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.experts.dispatch import no_gradient
from kernels.varying import vary_alike


class Exchange(NamedTuple):
  """An all-to-all among the devices along some mesh axes.

  Attributes:
    axis_names: the mesh axes; the devices are numbered with the last axis changing fastest.
    is_ragged: whether only the rows that exist travel (`jax.lax.ragged_all_to_all`, which CPUs
      lack). The rows of consecutive devices are then contiguous in the array. Otherwise each device
      has an equal part of the array, L rows, and all of them travel.
  """

  axis_names: Sequence[str]
  is_ragged: bool

  @property
  def num_devices(self) -> int:
    return jax.lax.axis_size(tuple(self.axis_names))

  def sizes(self, sent_nxe: jax.Array) -> jax.Array:
    """Rows that each device sends to this one, from the rows that this one sends to each."""
    return self._all_to_all(sent_nxe)

  def rows(
    self, x: jax.Array, sent_n: jax.Array, received_n: jax.Array, num_rows: int
  ) -> jax.Array:
    """Sends rows to each device; the result has those that arrive, and other rows undefined.

    Args:
      x: rows [R, ...]; those for each device begin at `begins`.
      sent_n: their numbers.
      received_n: the numbers of those that arrive.
      num_rows: N, the rows of the result, [N, ...]; R, unless it is ragged.
    """
    if self.is_ragged:
      return _ragged(self, x.shape[0], num_rows, x, sent_n, received_n)
    return self._all_to_all(x.reshape(self.num_devices, -1, *x.shape[1:])).reshape(x.shape)

  def _all_to_all(self, array: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(array, tuple(self.axis_names), 0, 0, tiled=True)


def begins(sizes_n: jax.Array, num_rows: int, is_ragged: bool) -> jax.Array:
  """The first row for or from each device, of `num_rows`; see `Exchange`."""
  if is_ragged:
    return jnp.cumsum(sizes_n) - sizes_n
  return num_rows // sizes_n.size * jnp.arange(sizes_n.size, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ragged(exchange: Exchange, R: int, N: int, x, sent_n, received_n):
  x, empty = vary_alike(x, jax.lax.empty((N, *x.shape[1:]), x.dtype))
  return jax.lax.ragged_all_to_all(
    x,
    empty,
    begins(sent_n, R, is_ragged=True),
    sent_n,
    # The first row in each receiver's result.
    exchange.sizes(begins(received_n, N, is_ragged=True)),
    received_n,
    axis_name=exchange.axis_names,
  )


def _ragged_forward(exchange, R, N, x, sent_n, received_n):
  return _ragged(exchange, R, N, x, sent_n, received_n), (sent_n, received_n)


def _ragged_backward(exchange, R, N, residuals, gradient):
  sent_n, received_n = residuals
  gradient = _ragged(exchange, N, R, gradient, received_n, sent_n)
  return gradient, no_gradient(sent_n), no_gradient(received_n)


_ragged.defvjp(_ragged_forward, _ragged_backward)
