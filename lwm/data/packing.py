"""The packing plan: which slices of which documents make up each row.

D documents, R rows, P slices, S sequence_length.

A document of at most S tokens stays whole in one row. A longer one is cut into rows of S tokens,
and the rest is packed like a short document. Documents are taken in a shuffled order, and each
piece goes to the row with the least room that still holds it (best fit). This leaves less than 1%
padding where pieces are much shorter than rows. The rows that long documents fill come first, so
shuffle the rows.
"""

import bisect
import dataclasses
import hashlib
import itertools

import numpy as np

# Most rows that still take pieces at one time; more would only slow the search.
_OPEN_ROWS = 16384


@dataclasses.dataclass(frozen=True)
class PackingPlan:
  """Row r holds the slices row_start[r] to row_start[r + 1] in turn, then padding."""

  sequence_length: int
  # int64 [R + 1]
  row_start: np.ndarray
  # int64 [P] each: the document, its first token in the slice, and the number of tokens.
  document: np.ndarray
  offset: np.ndarray
  length: np.ndarray

  @property
  def num_rows(self) -> int:
    return len(self.row_start) - 1

  def row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The document, offset and length of each slice of the row."""
    inside = slice(self.row_start[row], self.row_start[row + 1])
    return self.document[inside], self.offset[inside], self.length[inside]


def pack(lengths_D: np.ndarray, sequence_length: int, seed: int) -> PackingPlan:
  """The plan of one epoch: every token of every document is in exactly one slice.

  Documents of length 0 have no slice. The plan is a pure function of the arguments; memory is
  O(D + P).
  """
  order = np.random.default_rng(seed).permutation(len(lengths_D))
  full_rows = lengths_D // sequence_length
  rest = lengths_D % sequence_length

  # Rows that a single slice of a long document fills.
  long = order[full_rows[order] > 0]
  full_document = np.repeat(long, full_rows[long])
  first_of_document = np.cumsum(full_rows[long]) - full_rows[long]
  full_offset = (
    np.arange(len(full_document)) - np.repeat(first_of_document, full_rows[long])
  ) * sequence_length

  pieces = order[rest[order] > 0]
  piece_row = len(full_document) + _best_fit(rest[pieces].tolist(), sequence_length)

  row = np.concatenate([np.arange(len(full_document)), piece_row])
  by_row = np.argsort(row, kind="stable")
  num_rows = int(row.max(initial=-1)) + 1
  return PackingPlan(
    sequence_length=sequence_length,
    row_start=np.searchsorted(row[by_row], np.arange(num_rows + 1)),
    document=np.concatenate([full_document, pieces])[by_row],
    offset=np.concatenate([full_offset, full_rows[pieces] * sequence_length])[by_row],
    length=np.concatenate([np.full(len(full_document), sequence_length), rest[pieces]])[by_row],
  )


def derived_seed(*parts: object) -> int:
  """A seed in [0, 2**31) per tuple of names and numbers, the same on every machine."""
  digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()
  return int.from_bytes(digest) >> 1


def _best_fit(lengths: list[int], capacity: int) -> np.ndarray:
  """The row of each piece, in order: int64 [len(lengths)]."""
  rows = np.empty(len(lengths), np.int64)
  # Open rows as (room, row), sorted by room.
  open_rows: list[tuple[int, int]] = []
  new_rows = itertools.count()
  for piece, length in enumerate(lengths):
    place = bisect.bisect_left(open_rows, (length, 0))
    if place < len(open_rows):
      room, row = open_rows.pop(place)
    else:
      room, row = capacity, next(new_rows)
    rows[piece] = row
    if room > length:
      bisect.insort(open_rows, (room - length, row))
      if len(open_rows) > _OPEN_ROWS:
        open_rows.pop(0)
  return rows
