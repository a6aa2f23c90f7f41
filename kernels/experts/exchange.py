"""Sends rows to the devices of their experts and back, inside `jax.shard_map`.

n devices of the mesh axes, L rows per device, M model width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Exchange(NamedTuple):
  """An all-to-all among the devices along some mesh axes.

  Attributes:
    axis_names: the mesh axes; the devices are numbered with the last axis changing fastest.
    is_ragged: only the rows that exist travel (`jax.lax.ragged_all_to_all`, which CPUs lack).
      Otherwise all L rows do.
  """

  axis_names: Sequence[str]
  is_ragged: bool

  @property
  def num_devices(self) -> int:
    return jax.lax.axis_size(tuple(self.axis_names))

  def sizes(self, sent_nxe: jax.Array) -> jax.Array:
    """Rows that each device sends to this one, from the rows that this one sends to each."""
    return self._all_to_all(sent_nxe) if self.num_devices > 1 else sent_nxe

  def rows(self, x_nxLxM: jax.Array, sent_n: jax.Array, received_n: jax.Array) -> jax.Array:
    """Sends the first `sent` rows to each device; what arrives from each, [n, L, M].

    Rows from `received` on are zero if those sent from `sent` on are, or if it is ragged.
    """
    if self.num_devices == 1:
      return x_nxLxM
    if not self.is_ragged:
      return self._all_to_all(x_nxLxM)
    n, L, M = x_nxLxM.shape
    flat_RxM = x_nxLxM.reshape(n * L, M)
    begin_n = L * jnp.arange(n, dtype=jnp.int32)
    own_n = jnp.full(n, L, jnp.int32) * jax.lax.axis_index(tuple(self.axis_names))
    return jax.lax.ragged_all_to_all(
      flat_RxM,
      jnp.zeros_like(flat_RxM),
      begin_n,
      sent_n,
      own_n,
      received_n,
      axis_name=tuple(self.axis_names),
    ).reshape(n, L, M)

  def _all_to_all(self, array: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(array, tuple(self.axis_names), 0, 0, tiled=True)
