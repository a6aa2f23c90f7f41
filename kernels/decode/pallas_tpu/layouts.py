"""How XLA lays out a cache in a TPU's memory, and how the decode kernel works on it in place.

In memory, a cache [L, B, K, G, D] is one of

  rows: [L, B, K * G, D]. A block is a matrix of k * G rows, which all query heads multiply at once.
    Rows of other heads are masked like keys outside the interval. The matrix units load all rows of
    a block anyway, so this costs no time as long as the copies take longer.
  heads: [L, B, G, K, D], or [L, B, G, D, K], with the positions on lanes, if a head is narrower
    than a row of lanes. Each key/value head multiplies the queries of its group.

The scales of int8 caches, [L, B, K, G], are [L, B, G, K]. Nothing is transposed or copied.

L layers, B batch, Q query length, K cached positions, H query heads, G key/value heads, D head_dim,
N any width, R rows of queries, k positions per block, c columns of scores.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.attention.pallas_tpu.block_sizes import DECODE_COLUMNS
from kernels.attention.pallas_tpu.tiles import LANES, round_up
from kernels.decode.cache import Cached, Quantized

# Query rows are padded to whole registers of packed bfloat16.
SUBLANES = 16
# The most scores that the kernel works on at once.
PART_SCORES = 2**17


class Piece(NamedTuple):
  """The product of some query rows and a part of a block."""

  rows: slice  # Which of the R query rows.
  head: int  # Which key/value head; unused in `Rows`, where a piece has rows of all heads.
  columns: slice  # Which of the block's k * G rows (`Rows`) or k positions (`Heads`).


@dataclasses.dataclass(frozen=True)
class Rows:
  """Positions and heads on one axis. G is a power of two."""

  num_key_heads: int
  head_dim: int

  # The contracted axes of query and key, and of weights and value.
  key_axes = (1, 1)
  value_axes = (1, 0)

  def num_rows(self, Q: int, H: int) -> int:
    return round_up(Q * H, SUBLANES)

  def query_rows(self, array_BxQxHxN: jax.Array) -> jax.Array:
    """[B, R, N]."""
    B, Q, H, N = array_BxQxHxN.shape
    padding = (0, 0), (0, self.num_rows(Q, H) - Q * H), (0, 0)
    return jnp.pad(array_BxQxHxN.reshape(B, Q * H, N), padding)

  def from_query_rows(self, array_BxRxN: jax.Array, Q: int, H: int) -> jax.Array:
    """[B, Q, H, N]."""
    B, _, N = array_BxRxN.shape
    return array_BxRxN[:, : Q * H].reshape(B, Q, H, N)

  def view(self, numbers_LxBxKxGxD: jax.Array) -> jax.Array:
    L, B, K, G, D = numbers_LxBxKxGxD.shape
    return numbers_LxBxKxGxD.reshape(L, B, K * G, D)

  def block_shape(self, k: int) -> tuple[int, ...]:
    return k * self.num_key_heads, self.head_dim

  def block_index(self, begin: jax.Array, k: int) -> tuple:
    return (pl.ds(begin * self.num_key_heads, k * self.num_key_heads),)

  def pieces(self, R: int, k: int) -> list[Piece]:
    return [Piece(slice(0, R), 0, part) for part in _parts(k * self.num_key_heads, R)]

  def numbers(self, ref: Any, slot: jax.Array, piece: Piece) -> jax.Array:
    return ref[slot, piece.columns]

  def scales(self, ref: Any, slot: jax.Array, piece: Piece) -> jax.Array:
    """The scale of each column, float32 [1, c], from those of a block, [G, k]."""
    if self.num_key_heads == 1:
      return ref[slot, :, piece.columns]
    G = self.num_key_heads
    head_GxT = jax.lax.broadcasted_iota(jnp.int32, (G, LANES), 0)
    lane_GxT = jax.lax.broadcasted_iota(jnp.int32, (G, LANES), 1)
    tiles = []
    for tile in range(piece.columns.start // LANES, piece.columns.stop // LANES):
      first = tile // G * LANES
      source_GxT = ref[slot, :, first : first + LANES]
      position_GxT = tile % G * (LANES // G) + self.position(lane_GxT)
      spread_GxT = jnp.take_along_axis(source_GxT, position_GxT, axis=1, mode="promise_in_bounds")
      own_GxT = jnp.where(lane_GxT & (G - 1) == head_GxT, spread_GxT, 0.0)
      tiles.append(jnp.sum(own_GxT, axis=0, keepdims=True))
    return jnp.concatenate(tiles, axis=1)

  def position(self, column: jax.Array) -> jax.Array:
    """The position of a column, counted from the start of the block."""
    return column >> (self.num_key_heads.bit_length() - 1)

  def is_own(self, column: jax.Array, head: jax.Array) -> jax.Array | None:
    """Whether a column belongs to that key/value head; None if all columns do."""
    return None if self.num_key_heads == 1 else column & (self.num_key_heads - 1) == head


@dataclasses.dataclass(frozen=True)
class Heads:
  """One axis per head for its positions, on lanes (`is_transposed`) or on sublanes."""

  num_key_heads: int
  head_dim: int
  is_transposed: bool

  @property
  def key_axes(self) -> tuple[int, int]:
    return (1, 0) if self.is_transposed else (1, 1)

  @property
  def value_axes(self) -> tuple[int, int]:
    return (1, 1) if self.is_transposed else (1, 0)

  def num_rows(self, Q: int, H: int) -> int:
    return self.num_key_heads * round_up(Q * H // self.num_key_heads, SUBLANES)

  def query_rows(self, array_BxQxHxN: jax.Array) -> jax.Array:
    """[B, R, N], with the rows of a group together."""
    B, Q, H, N = array_BxQxHxN.shape
    G, R = self.num_key_heads, self.num_rows(Q, H)
    array_BxGxqxN = jnp.swapaxes(array_BxQxHxN.reshape(B, Q, G, -1, N), 1, 2).reshape(B, G, -1, N)
    padding = (0, 0), (0, 0), (0, (R - Q * H) // G), (0, 0)
    return jnp.pad(array_BxGxqxN, padding).reshape(B, R, N)

  def from_query_rows(self, array_BxRxN: jax.Array, Q: int, H: int) -> jax.Array:
    """[B, Q, H, N]."""
    B, _, N = array_BxRxN.shape
    G = self.num_key_heads
    array_BxGxqxN = array_BxRxN.reshape(B, G, -1, N)[:, :, : Q * H // G]
    return jnp.swapaxes(array_BxGxqxN.reshape(B, G, Q, -1, N), 1, 2).reshape(B, Q, H, N)

  def view(self, numbers_LxBxKxGxD: jax.Array) -> jax.Array:
    axes = (0, 1, 3, 4, 2) if self.is_transposed else (0, 1, 3, 2, 4)
    return numbers_LxBxKxGxD.transpose(axes)

  def block_shape(self, k: int) -> tuple[int, ...]:
    shape = (self.head_dim, k) if self.is_transposed else (k, self.head_dim)
    return self.num_key_heads, *shape

  def block_index(self, begin: jax.Array, k: int) -> tuple:
    everything, positions = slice(None), pl.ds(begin, k)
    return (everything, everything, positions) if self.is_transposed else (everything, positions)

  def pieces(self, R: int, k: int) -> list[Piece]:
    rows = R // self.num_key_heads
    return [
      Piece(slice(head * rows, (head + 1) * rows), head, part)
      for head in range(self.num_key_heads)
      for part in _parts(k, rows)
    ]

  def numbers(self, ref: Any, slot: jax.Array, piece: Piece) -> jax.Array:
    if self.is_transposed:
      return ref[slot, piece.head, :, piece.columns]
    return ref[slot, piece.head, piece.columns]

  def scales(self, ref: Any, slot: jax.Array, piece: Piece) -> jax.Array:
    return ref[slot, piece.head : piece.head + 1, piece.columns]

  def position(self, column: jax.Array) -> jax.Array:
    return column

  def is_own(self, column: jax.Array, head: jax.Array) -> None:
    return None


def layout_of(cached: Cached) -> Rows | Heads | None:
  """How XLA lays out [L, B, K, G, D] on TPU; None if no kernel can use its tiles in place."""
  numbers = jax.tree.leaves(cached)[0]
  G, D = numbers.shape[3:]
  is_int8 = numbers.dtype == jnp.int8
  if D < LANES:
    return None if is_int8 else Heads(G, D, is_transposed=True)
  if D == LANES and is_int8 and G == 2:
    return Heads(G, D, is_transposed=False)
  # If a head is wider than a row of lanes, parts of the heads alternate unless they fill tiles.
  is_rows = D == LANES or G % 8 == 0 or (G == 1 and numbers.dtype == jnp.bfloat16)
  return Rows(G, D) if is_rows and not G & (G - 1) else None


def view(cached: Cached, layout: Rows | Heads) -> Cached:
  """The cache with its axes in the order of memory, which copies nothing."""
  if isinstance(cached, Quantized):
    return Quantized(layout.view(cached.value), jnp.swapaxes(cached.scale, 2, 3))
  return layout.view(cached)


def _parts(columns: int, rows: int) -> list[slice]:
  most = min(DECODE_COLUMNS, max(PART_SCORES // rows // LANES, 1) * LANES)
  return [slice(first, min(first + most, columns)) for first in range(0, columns, most)]
