"""Keys and values of the tokens that a sampler has processed.

L layers, B batch, Q new tokens, K cached tokens, G key/value heads, D head_dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention import KeyIntervals
from kernels.decode import STRETCH, Cached


class Cache(NamedTuple):
  """Keys, already rotated to their positions, and values.

  Rows may have different lengths: they are padded on the left, or each has its own `length`.

  Attributes:
    key_LxBxKxGxD: in the compute dtype, or int8 (`kernels.decode.Quantized`). Columns from `length`
      on are not yet written. Over several devices, columns are in the order of `stripe`.
    value_LxBxKxGxD: likewise.
    start_B: int32, the column of each row's first token; earlier columns are padding.
    length: int32, the number of columns written: a scalar, or [B], one per row.
    last_vision_B: int32, the column of each row's last vision id, -1 before the first one; None
      unless the model has `ModelConfig.adapter`.
  """

  key_LxBxKxGxD: Cached
  value_LxBxKxGxD: Cached
  start_B: jax.Array
  length: jax.Array
  last_vision_B: jax.Array | None = None

  def columns(self, num_tokens: int) -> jax.Array:
    """Columns of the next tokens, int32 [B, Q]."""
    # The zeros carry the sharding of the rows.
    length_B = jnp.zeros_like(self.start_B) + self.length
    return length_B[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None]

  def positions(self, num_tokens: int) -> jax.Array:
    """Positions of the next tokens in their rows, int32 [B, Q]."""
    return jnp.maximum(self.columns(num_tokens) - self.start_B[:, None], 0)

  def intervals(self, num_tokens: int) -> KeyIntervals:
    """The columns up to and including each of the next tokens, without padding."""
    stop_BxQ = self.columns(num_tokens) + 1
    return KeyIntervals(jnp.broadcast_to(self.start_B[:, None], stop_BxQ.shape), stop_BxQ)

  def advance(self, num_tokens: int | jax.Array) -> "Cache":
    """The cache after all layers wrote the next tokens: one number for all rows, or int32 [B]."""
    return self._replace(length=self.length + num_tokens)


def stripe(num_columns: int) -> int:
  """The number of consecutive columns that a device holds; see `kernels.decode.local_length`.

  The devices get stripes of columns in turn, so that they have equal work while a cache fills.

  Args:
    num_columns: of one device.
  """
  return math.gcd(num_columns, STRETCH)
