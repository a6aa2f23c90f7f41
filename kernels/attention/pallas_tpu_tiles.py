"""Tiles of queries and keys for the TPU kernels, and the tables that say which tiles meet.

A query tile holds q consecutive queries of the r heads that share one key/value head, as q * r
rows: every key block that is loaded serves them all. The tables take O(S / block) scalars and XLA
computes them from the intervals without a Q x K array.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim, N query tiles, M key
blocks, q queries in a tile, k keys in a block, R = q * r rows in a tile, P = H / r, T = B * P rows
of tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention.intervals import KeyIntervals

LANES = 128
# Fields of a query tile in `key_spans`.
FIRST, STOP, FULL_FIRST, FULL_STOP = range(4)


class Tiling(NamedTuple):
  """How one kernel cuts its operands.

  `cores` tells how many TensorCores share the tiles of one row of T (interleaved, so that a causal
  mask gives both the same work): 2 where a chip joins two and T is odd, else 1.
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
    """Whole number of tiles for each core; the last may be all padding."""
    return round_up(-(-self.query_length // self.queries), self.cores)

  @property
  def num_key_blocks(self) -> int:
    return round_up(-(-self.key_length // self.keys), self.cores)

  @property
  def key_sharing(self) -> int:
    """Rows of T that read one row of keys."""
    return self.num_heads // self.num_key_heads // self.heads


def round_up(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple


def query_tiles(array_BxQxHxD: jax.Array, tiling: Tiling) -> jax.Array:
  """[T, N, R, D], head-major rows, Q padded with zeros."""
  B, _, H, D = array_BxQxHxD.shape
  N, q, r = tiling.num_query_tiles, tiling.queries, tiling.heads
  array_BxNxqxPxrxD = _pad(array_BxQxHxD, N * q).reshape(B, N, q, H // r, r, D)
  return array_BxNxqxPxrxD.transpose(0, 3, 1, 4, 2, 5).reshape(B * H // r, N, r * q, D)


def key_blocks(array_BxKxGxD: jax.Array, tiling: Tiling) -> jax.Array:
  """[B * G, M, k, D], K padded with zeros, which no interval reaches."""
  B, _, G, D = array_BxKxGxD.shape
  M, k = tiling.num_key_blocks, tiling.keys
  array_BxMxkxGxD = _pad(array_BxKxGxD, M * k).reshape(B, M, k, G, D)
  return array_BxMxkxGxD.transpose(0, 3, 1, 2, 4).reshape(B * G, M, k, D)


def from_query_tiles(array_TxNxDxR: jax.Array, tiling: Tiling) -> jax.Array:
  """[B, Q, H, D] from tiles with the rows last, as the kernels write them."""
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
  """[T, N, len(arrays), R]: what the kernels need to know of each row, rows on lanes."""
  tiles = [query_tiles(array[..., None], tiling)[..., 0] for array in arrays_BxQxH]
  return jnp.stack(tiles, axis=2)


def interval_tiles(intervals: KeyIntervals, tiling: Tiling) -> jax.Array:
  """int32 [B, N, 2, R]: starts and stops of each row, the same for all heads of a tile.

  The last tile is filled up with its last query's interval, so that padding does not turn its full
  blocks into masked ones; tiles of nothing but padding are empty.
  """
  q, N = tiling.queries, tiling.num_query_tiles
  filled = round_up(tiling.query_length, q)
  tiles = []
  for array_BxQ in intervals:
    edge_BxQ = jnp.pad(array_BxQ, ((0, 0), (0, filled - tiling.query_length)), mode="edge")
    tiles.append(_pad(edge_BxQ, N * q).reshape(-1, N, q))
  return jnp.tile(jnp.stack(tiles, axis=2), (1, 1, 1, tiling.heads))


def key_spans(intervals_BxNx2xR: jax.Array, tiling: Tiling) -> jax.Array:
  """Which key blocks each query tile reads: int32 [B, 1, N * 4].

  Four numbers a tile: blocks FIRST..STOP hold all keys that its queries see, and in blocks
  FULL_FIRST..FULL_STOP every query sees every key, so that they need no mask.
  """
  k = tiling.keys
  start_BxNxR, stop_BxNxR = intervals_BxNx2xR[:, :, 0], intervals_BxNx2xR[:, :, 1]
  is_empty_BxNxR = stop_BxNxR <= start_BxNxR
  last_key = jnp.iinfo(jnp.int32).max
  stop_BxN = -(-jnp.max(jnp.where(is_empty_BxNxR, 0, stop_BxNxR), axis=-1) // k)
  first_BxN = jnp.min(jnp.where(is_empty_BxNxR, last_key, start_BxNxR), axis=-1) // k
  first_BxN = jnp.minimum(first_BxN, stop_BxN)
  # One empty row in a tile leaves nothing between the largest start and the smallest stop.
  full_first_BxN = -(-jnp.max(start_BxNxR, axis=-1) // k)
  full_stop_BxN = jnp.min(stop_BxNxR, axis=-1) // k
  spans_BxNx4 = jnp.stack([first_BxN, stop_BxN, full_first_BxN, full_stop_BxN], axis=-1)
  return spans_BxNx4.reshape(spans_BxNx4.shape[0], 1, -1)


def query_spans(key_spans_Bx1xN4: jax.Array, tiling: Tiling) -> jax.Array:
  """The transposed table: int32 [B, 1, M * 2], first and last + 1 query tile that read each block.

  A tile between them need not read the block: the kernel looks at `key_spans` before it loads.
  """
  spans_BxNx4 = key_spans_Bx1xN4.reshape(key_spans_Bx1xN4.shape[0], -1, 4)
  tile_N = jnp.arange(spans_BxNx4.shape[1], dtype=jnp.int32)
  block_M = jnp.arange(tiling.num_key_blocks, dtype=jnp.int32)
  # XLA fuses the comparison into the reductions: no N x M array exists.
  reads_BxMxN = (spans_BxNx4[:, None, :, FIRST] <= block_M[:, None]) & (
    block_M[:, None] < spans_BxNx4[:, None, :, STOP]
  )
  stop_BxM = jnp.max(jnp.where(reads_BxMxN, tile_N + 1, 0), axis=-1)
  first_BxM = jnp.min(jnp.where(reads_BxMxN, tile_N, tile_N.size), axis=-1)
  spans_BxMx2 = jnp.stack([jnp.minimum(first_BxM, stop_BxM), stop_BxM], axis=-1)
  return spans_BxMx2.reshape(spans_BxMx2.shape[0], 1, -1)


def _pad(array: jax.Array, length: int) -> jax.Array:
  """Pads axis 1 with zeros to `length`."""
  return jnp.pad(array, [(0, 0), (0, length - array.shape[1])] + [(0, 0)] * (array.ndim - 2))
