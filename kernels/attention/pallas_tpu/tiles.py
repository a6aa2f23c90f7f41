"""Tiles of queries and blocks of keys for the TPU kernels, and the tables of which of them meet.

A query tile holds q consecutive queries of r heads that share one key/value head, as q * r rows, so
that every loaded key block serves all of them.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim, N query tiles, M key
blocks, q queries per tile, k keys per block, R = q * r rows per tile, P = H / r, T = B * P rows of
tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention import block_tables
from kernels.attention.intervals import KeyIntervals

LANES = 128


class Tiling(NamedTuple):
  """How one kernel divides its operands.

  `cores` is the number of TensorCores that share the tiles of one row of T: 2 if a device has two
  and T is odd, else 1. They take tiles in turn, so that a causal mask gives both the same work.
  """

  query_length: int
  key_length: int
  num_heads: int
  num_key_heads: int
  heads: int  # r
  queries: int  # q
  keys: int  # k
  cores: int

  @property
  def rows(self) -> int:
    return self.heads * self.queries

  @property
  def num_query_tiles(self) -> int:
    """A multiple of `cores`; the last tile may be all padding."""
    return round_up(-(-self.query_length // self.queries), self.cores)

  @property
  def num_key_blocks(self) -> int:
    return round_up(-(-self.key_length // self.keys), self.cores)

  @property
  def key_sharing(self) -> int:
    """Number of rows of T that read the same keys."""
    return self.num_heads // self.num_key_heads // self.heads


def round_up(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple


def query_tiles(array_BxQxHxD: jax.Array, tiling: Tiling) -> jax.Array:
  """[T, N, R, D], with head-major rows, and Q padded with zeros."""
  B, _, H, D = array_BxQxHxD.shape
  N, q, r = tiling.num_query_tiles, tiling.queries, tiling.heads
  array_BxNxqxPxrxD = _pad(array_BxQxHxD, N * q).reshape(B, N, q, H // r, r, D)
  return array_BxNxqxPxrxD.transpose(0, 3, 1, 4, 2, 5).reshape(B * H // r, N, r * q, D)


def key_blocks(array_BxKxGxD: jax.Array, tiling: Tiling) -> jax.Array:
  """[B * G, M, k, D], with K padded with zeros, which no interval reaches."""
  B, _, G, D = array_BxKxGxD.shape
  M, k = tiling.num_key_blocks, tiling.keys
  array_BxMxkxGxD = _pad(array_BxKxGxD, M * k).reshape(B, M, k, G, D)
  return array_BxMxkxGxD.transpose(0, 3, 1, 2, 4).reshape(B * G, M, k, D)


def from_query_tiles(array_TxNxDxR: jax.Array, tiling: Tiling) -> jax.Array:
  """[B, Q, H, D], from tiles with the rows last, as the kernels write them."""
  T, N, D, _ = array_TxNxDxR.shape
  H, q, r = tiling.num_heads, tiling.queries, tiling.heads
  array_BxPxNxDxrxq = array_TxNxDxR.reshape(T * r // H, H // r, N, D, r, q)
  array_BxNxqxPxrxD = array_BxPxNxDxrxq.transpose(0, 2, 5, 1, 4, 3)
  return array_BxNxqxPxrxD.reshape(-1, N * q, H, D)[:, : tiling.query_length]


def from_key_blocks(array_TxMxkxD: jax.Array, tiling: Tiling) -> jax.Array:
  """[B, K, G, D], summed over the rows of T that share keys."""
  T, M, k, D = array_TxMxkxD.shape
  G, shared = tiling.num_key_heads, tiling.key_sharing
  array_BxGxMxkxD = array_TxMxkxD.reshape(-1, G, shared, M, k, D).sum(2)
  return array_BxGxMxkxD.transpose(0, 2, 3, 1, 4).reshape(-1, M * k, G, D)[:, : tiling.key_length]


def row_statistics(arrays_BxQxH: tuple[jax.Array, ...], tiling: Tiling) -> jax.Array:
  """[T, N, len(arrays), R]: numbers that the kernels need for each row, with the rows on lanes."""
  tiles = [query_tiles(array[..., None], tiling)[..., 0] for array in arrays_BxQxH]
  return jnp.stack(tiles, axis=2)


def interval_tiles(intervals: KeyIntervals, tiling: Tiling) -> jax.Array:
  """int32 [B, N, 2, R]: the start and stop of each row, the same for all heads of a tile.

  Padding in the last tile repeats the interval of the last query, so that it does not turn full
  blocks into masked ones. Tiles of only padding are empty.
  """
  q, N = tiling.queries, tiling.num_query_tiles
  filled = round_up(tiling.query_length, q)
  tiles = []
  for array_BxQ in intervals:
    edge_BxQ = jnp.pad(array_BxQ, ((0, 0), (0, filled - tiling.query_length)), mode="edge")
    tiles.append(_pad(edge_BxQ, N * q).reshape(-1, N, q))
  return jnp.tile(jnp.stack(tiles, axis=2), (1, 1, 1, tiling.heads))


def key_spans(intervals_BxNx2xR: jax.Array, tiling: Tiling) -> jax.Array:
  """The key blocks that each query tile reads: `block_tables.of_queries` as int32 [B, 1, N * 4].

  A block that is full for a tile needs no mask for any of its rows: tiles with an empty row have no
  full blocks.
  """
  B = intervals_BxNx2xR.shape[0]
  start_BxNR, stop_BxNR = (intervals_BxNx2xR[:, :, i].reshape(B, -1) for i in range(2))
  tables_Bx4xN = block_tables.of_queries(
    KeyIntervals(start_BxNR, stop_BxNR),
    tiling.key_length,
    tiling.rows,
    tiling.keys,
    full_with_empty_rows=False,
  )
  return jnp.swapaxes(tables_Bx4xN, 1, 2).reshape(B, 1, -1)


def query_spans(key_spans_Bx1xN4: jax.Array, tiling: Tiling) -> jax.Array:
  """The transposed table: the first query tile that reads each key block, and the last one + 1.

  int32 [B, 1, M * 2]. Tiles between them may not read the block: the kernel looks at `key_spans`
  before it loads one.
  """
  B = key_spans_Bx1xN4.shape[0]
  tables_Bx4xN = jnp.swapaxes(key_spans_Bx1xN4.reshape(B, -1, 4), 1, 2)
  tables_Bx4xM = block_tables.of_keys(tables_Bx4xN, tiling.num_key_blocks)
  return jnp.swapaxes(tables_Bx4xM[:, :2], 1, 2).reshape(B, 1, -1)


def _pad(array: jax.Array, length: int) -> jax.Array:
  """Pads axis 1 with zeros to `length`."""
  return jnp.pad(array, [(0, 0), (0, length - array.shape[1])] + [(0, 0)] * (array.ndim - 2))
