"""The only kind of mask in this codebase: each query row sees one contiguous interval of keys.

B batch, Q/K query/key length, S sequence length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeyIntervals(NamedTuple):
  """Query row i of batch row b attends to the keys [start[b, i], stop[b, i]).

  Both arrays are int32 and hold key indices of the unpermuted sequence, within [0, K]. A row with
  stop <= start is empty: its output is 0, its log-sum-exp is -inf and its gradient is 0.
  """

  start_BxQ: jax.Array
  stop_BxQ: jax.Array


def causal(batch_size: int, length: int) -> KeyIntervals:
  """Query i sees the keys [0, i + 1)."""
  stop_S = jnp.arange(1, length + 1, dtype=jnp.int32)
  stop_BxS = jnp.broadcast_to(stop_S, (batch_size, length))
  return KeyIntervals(jnp.zeros_like(stop_BxS), stop_BxS)


def packed(segment_ids_BxS: jax.Array) -> KeyIntervals:
  """Causal attention within each document of a packed row.

  Args:
    segment_ids_BxS: integers; a run of equal ids is one document, and 0 is padding.
  """
  index_1xS = jnp.arange(segment_ids_BxS.shape[1], dtype=jnp.int32)[None]
  before_BxS = jnp.pad(segment_ids_BxS[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  first_BxS = jnp.where(segment_ids_BxS != before_BxS, index_1xS, 0)
  is_token_BxS = segment_ids_BxS > 0
  return KeyIntervals(
    jnp.where(is_token_BxS, jax.lax.cummax(first_BxS, axis=1), 0),
    jnp.where(is_token_BxS, index_1xS + 1, 0),
  )


def windowed(intervals: KeyIntervals, window: int) -> KeyIntervals:
  """Keeps the last `window` keys of each interval (sliding window, arXiv 2310.06825).

  After `causal` or `packed`, query i sees the keys (i - window, i] of its document.
  """
  return KeyIntervals(
    jnp.maximum(intervals.start_BxQ, intervals.stop_BxQ - window), intervals.stop_BxQ
  )


def within(intervals: KeyIntervals, offset: jax.Array | int, length: int) -> KeyIntervals:
  """Cuts each interval to the keys [offset, offset + length), counted from `offset`."""
  return KeyIntervals(
    jnp.clip(intervals.start_BxQ - offset, 0, length),
    jnp.clip(intervals.stop_BxQ - offset, 0, length),
  )


def mask(intervals: KeyIntervals, num_keys: int) -> jax.Array:
  """The intervals as a bool array [B, Q, K], for references and tests: it takes O(S^2) memory."""
  key_1x1xK = jnp.arange(num_keys)[None, None]
  start_BxQx1, stop_BxQx1 = (array_BxQ[..., None] for array_BxQ in intervals)
  return (key_1x1xK >= start_BxQx1) & (key_1x1xK < stop_BxQx1)
