"""The part of a batch that this process holds, and the global arrays made of all parts.

B rows of a batch, S sequence_length, C columns of a row that this process holds.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from kernels.ring.layout import Layout
from lwm.config.batch import FIELDS
from lwm.parallel.sharding import ShardingRules

# (row, runs, out): fills `out` with the columns of the row that lie in `runs`; see Rows.read.
ReadRow = Callable[[int, Sequence[tuple[int, int]], dict[str, np.ndarray]], None]
# (first row, last row, first column, last column) of a device's shard, each last one excluded, ->
# its fields.
Shards = dict[tuple[int, int, int, int], dict[str, np.ndarray]]


@dataclasses.dataclass
class _RowGroup:
  """Rows that local devices share; each column is read once for all devices that hold it."""

  rows: tuple[int, int]
  # Ranges of global columns, increasing.
  runs: list[tuple[int, int]]
  # For each range of laid-out columns on a device, their places among the C columns read.
  gathers: dict[tuple[int, int], np.ndarray]


class Placement:
  """Batches [B, S] sharded over a mesh as (batch, sequence), columns in the layout's order."""

  def __init__(self, mesh: Mesh, layout: Layout, num_rows: int, sequence_length: int):
    self.shape = (num_rows, sequence_length)
    self.sharding = NamedSharding(mesh, ShardingRules().spec("batch", "sequence"))
    permutation_S = layout.permutation(sequence_length)
    indices = self.sharding.addressable_devices_indices_map(self.shape).values()
    shards = {self._key(index) for index in indices}
    self._groups = []
    for rows in sorted({key[:2] for key in shards}):
      columns = sorted(key[2:] for key in shards if key[:2] == rows)
      held_C = np.sort(np.concatenate([permutation_S[slice(*range_)] for range_ in columns]))
      breaks = np.flatnonzero(np.diff(held_C) != 1)
      starts = held_C[np.concatenate([[0], breaks + 1])]
      stops = held_C[np.concatenate([breaks, [-1]])] + 1
      self._groups.append(
        _RowGroup(
          rows=rows,
          runs=list(zip(starts.tolist(), stops.tolist())),
          gathers={
            range_: np.searchsorted(held_C, permutation_S[slice(*range_)]) for range_ in columns
          },
        )
      )

  def _key(self, index: tuple[slice, ...] | None) -> tuple[int, int, int, int]:
    assert index is not None  # JAX gives None to devices outside the sharding only.
    rows, columns = (part.indices(size)[:2] for part, size in zip(index, self.shape))
    return *rows, *columns

  def read(self, read_row: ReadRow) -> Shards:
    """Reads the shards of this process's devices, and no other rows or columns."""
    shards: Shards = {}
    for group in self._groups:
      num_rows = group.rows[1] - group.rows[0]
      num_columns = sum(stop - start for start, stop in group.runs)
      fields = {name: np.zeros((num_rows, num_columns), dtype) for name, dtype in FIELDS.items()}
      for row in range(num_rows):
        out = {name: field[row] for name, field in fields.items()}
        read_row(group.rows[0] + row, group.runs, out)
      for columns, gather in group.gathers.items():
        shards[*group.rows, *columns] = {name: field[:, gather] for name, field in fields.items()}
    return shards

  def to_arrays(self, shards: Shards) -> dict[str, jax.Array]:
    """The global arrays of a batch, [B, S] each."""
    arrays: dict[str, jax.Array] = {}
    for name in FIELDS:

      def shard(index: tuple[slice, ...] | None, name: str = name) -> np.ndarray:
        return shards[self._key(index)][name]

      arrays[name] = jax.make_array_from_callback(self.shape, self.sharding, shard)
    return arrays


# (first row, last row) of a device's shard, the last one excluded, -> its frames.
FrameShards = dict[tuple[int, int], np.ndarray]


class FramePlacement:
  """Batches of frames, uint8 [B, H, W, 3], whose rows are divided over a mesh."""

  def __init__(self, mesh: Mesh, num_frames: int, resolution: int):
    self._shape = (num_frames, resolution, resolution, 3)
    self._sharding = NamedSharding(mesh, ShardingRules().spec("batch"))
    indices = self._sharding.addressable_devices_indices_map(self._shape).values()
    self._rows = sorted({self._key(index) for index in indices})

  def _key(self, index: tuple[slice, ...] | None) -> tuple[int, int]:
    assert index is not None  # JAX gives None to devices outside the sharding only.
    return index[0].indices(self._shape[0])[:2]

  def read(self, read_frame: Callable[[int], np.ndarray]) -> FrameShards:
    """Reads the frames of this process's devices, and no others.

    Args:
      read_frame: gives the frame of a row, uint8 [H, W, 3].
    """
    return {
      (first, stop): np.stack([read_frame(row) for row in range(first, stop)])
      for first, stop in self._rows
    }

  def to_array(self, shards: FrameShards) -> jax.Array:
    """The global array of a batch."""
    return jax.make_array_from_callback(
      self._shape, self._sharding, lambda index: shards[self._key(index)]
    )
