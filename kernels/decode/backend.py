"""What a decode backend provides: attention to the cached positions of one device.

L layers, B batch, Q query length, K cached positions on this device, H query heads, G key/value
heads, D head_dim.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

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
  """One implementation of attention to a cache; see `kernels.backends.Backend`."""

  name: str
  unsupported: Callable[[Any, Any], str | None]
  partial: Partial

  def with_sizes(self, sizes: Mapping[str, Any]) -> "Backend":
    """See `kernels.attention.backend.Backend.with_sizes`."""
    return self._replace(partial=functools.partial(cast(Any, self.partial), sizes=sizes))
