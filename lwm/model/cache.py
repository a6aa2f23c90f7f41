"""Keys and values of the tokens that a sampler has processed.

L layers, B batch, Q new tokens, K cached tokens, G key/value heads, D head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention import KeyIntervals


class Cache(NamedTuple):
  """Keys, already rotated to their positions, and values.

  Shorter rows are padded on the left.

  Attributes:
    key_LxBxKxGxD: in the compute dtype; columns from `length` on are not yet written.
    value_LxBxKxGxD: likewise.
    start_B: int32, the column of each row's first token; earlier columns are padding.
    length: int32 scalar, the number of columns written.
    last_vision_B: int32, the column of each row's last vision id, -1 before the first one; None
      unless the model has `ModelConfig.adapter`.
  """

  key_LxBxKxGxD: jax.Array
  value_LxBxKxGxD: jax.Array
  start_B: jax.Array
  length: jax.Array
  last_vision_B: jax.Array | None = None

  def columns(self, num_tokens: int) -> jax.Array:
    """Columns of the next tokens, int32 [B, Q]."""
    column_Q = self.length + jnp.arange(num_tokens, dtype=jnp.int32)
    # The zeros carry the sharding of the rows.
    return jnp.zeros_like(self.start_B)[:, None] + column_Q[None]

  def positions(self, num_tokens: int) -> jax.Array:
    """Positions of the next tokens in their rows, int32 [B, Q]."""
    return jnp.maximum(self.columns(num_tokens) - self.start_B[:, None], 0)

  def intervals(self, num_tokens: int) -> KeyIntervals:
    """The columns up to and including each of the next tokens, without padding."""
    stop_BxQ = self.columns(num_tokens) + 1
    return KeyIntervals(jnp.broadcast_to(self.start_B[:, None], stop_BxQ.shape), stop_BxQ)

  def advance(self, num_tokens: int) -> "Cache":
    """The cache after all layers have written the next tokens."""
    return self._replace(length=self.length + num_tokens)
