"""Which part of a batch this process holds, and how it becomes a global array.

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

# Fills the columns in some runs of global columns of a row; see Rows.read.
ReadRow = Callable[[int, Sequence[tuple[int, int]], dict[str, np.ndarray]], None]
# (first row, last, first column, last) of a device's shard -> its fields.
Shards = dict[tuple[int, int, int, int], dict[str, np.ndarray]]


@dataclasses.dataclass
class _RowGroup:
  """Rows of which some local devices hold columns; each column is read once for all of them."""

  rows: tuple[int, int]
  # Ranges of global columns, increasing.
  runs: list[tuple[int, int]]
  # For each range of laid-out columns on a device, where they are among the C read.
  gathers: dict[tuple[int, int], np.ndarray]


class Placement:
  """Batches [B, S] over a mesh.

  Rows are divided over the axes of `batch`, columns, in the order of the layout, over those of
  `sequence` (see lwm/parallel/sharding.py).
  """

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

  def _key(self, index: tuple[slice, slice]) -> tuple[int, int, int, int]:
    return tuple(bound for part, size in zip(index, self.shape) for bound in part.indices(size)[:2])

  def read(self, read_row: ReadRow) -> Shards:
    """The shards of this process's devices; `read_row` is asked for no other row or column."""
    shards = {}
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
    return {
      name: jax.make_array_from_callback(
        self.shape, self.sharding, lambda index, name=name: shards[self._key(index)][name]
      )
      for name in FIELDS
    }
