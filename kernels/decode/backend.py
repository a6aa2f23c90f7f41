"""What a decode backend provides: attention to the cached positions of one device.

L layers, B batch, Q query length, K cached positions on this device, H query heads, G key/value
heads, D head_dim.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from kernels.attention.intervals import KeyIntervals
from kernels.decode.cache import Cached


class Partial(Protocol):
  """Attention to the cached positions of one device."""

  def __call__(
    self,
    query_BxQxHxD: jax.Array,
    key_LxBxKxGxD: Cached,
    value_LxBxKxGxD: Cached,
    layer: jax.Array,
    intervals: KeyIntervals,
    *,
    scale: float,
    soft_cap: float | None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns out [B, Q, H, D] and log_sum_exp [B, Q, H] (-inf in empty rows), both float32."""


class Backend(NamedTuple):
  """One implementation of attention to a cache.

  `unsupported(query, key)`, the key being a whole cache, is a clause saying what stands against
  these shapes and dtypes on this platform and what would work, or None.
  """

  name: str
  unsupported: Callable[[jax.Array, Cached], str | None]
  partial: Partial

  def with_sizes(self, sizes: Mapping[str, Any]) -> "Backend":
    """As `kernels.attention.backend.Backend.with_sizes`."""
    return self._replace(partial=functools.partial(self.partial, sizes=sizes))
