"""What a packed row holds, for people to look at.

S sequence_length, T tokens of a segment, N frames, P codes per frame.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lwm.config.batch import FIELDS
from lwm.config.vqgan import VisionLayout
from lwm.data.rows import Rows


class Segment(NamedTuple):
  """Consecutive tokens of one document: frames, or text with one weight.

  Attributes:
    column: of the first token.
    tokens: int32 [T].
    is_vision: whether they are vision ids.
    weight: in the loss, of each token as a target.
  """

  column: int
  tokens: np.ndarray
  is_vision: bool
  weight: float


class Slice(NamedTuple):
  """The part of a document that a row holds.

  Attributes:
    document: its number in the split.
    offset: its first token in the row.
    document_length: of the whole document.
    segments: in order.
  """

  document: int
  offset: int
  document_length: int
  segments: list[Segment]

  @property
  def length(self) -> int:
    return sum(len(segment.tokens) for segment in self.segments)


def row_slices(
  rows: Rows, row: int, sequence_length: int, text_vocab_size: int
) -> tuple[list[Slice], dict[str, np.ndarray]]:
  """The slices of a row, and its fields [S] as the loader makes them (lwm/config/batch.py)."""
  fields = {name: np.zeros(sequence_length, dtype) for name, dtype in FIELDS.items()}
  rows.read(row, [(0, sequence_length)], fields)
  slices = []
  column = 0
  for document, offset, length in zip(*rows.plan.row(row)):
    columns = slice(column, column + length)
    tokens = fields["tokens"][columns]
    # The weight at a column is the weight of its target, which is the next token.
    weights = np.append(np.zeros(1, np.float32), fields["loss_weights"][columns][:-1])
    slices.append(
      Slice(
        document=int(document),
        offset=int(offset + rows.kept.first_D[document]),
        document_length=int(rows.split.lengths[document]),
        segments=list(_segments(column, tokens, tokens >= text_vocab_size, weights)),
      )
    )
    column += length
  return slices, fields


def _segments(
  column: int, tokens: np.ndarray, is_vision: np.ndarray, weights: np.ndarray
) -> Iterator[Segment]:
  # The first token of a row is no target, and would part a frame.
  changes = np.diff(is_vision) | (np.diff(weights) != 0) & ~is_vision[1:]
  borders = [0, *(np.flatnonzero(changes) + 1).tolist(), len(tokens)]
  for start, stop in zip(borders, borders[1:]):
    is_frames, weight = bool(is_vision[start]), float(weights[stop - 1])
    yield Segment(column + start, tokens[start:stop], is_frames, weight)


def whole_frames(tokens: np.ndarray, text_vocab_size: int, layout: VisionLayout) -> np.ndarray:
  """Codes int32 [N, P] of the frames that a vision segment holds from their first code to the last.

  A row may cut the first and the last frame of a segment.
  """
  codes = tokens - text_vocab_size
  ends = np.flatnonzero(codes >= layout.end_of_frame)
  starts = ends - layout.codes_per_frame
  starts = starts[starts >= 0]
  return np.array(
    [codes[start : start + layout.codes_per_frame] for start in starts], np.int32
  ).reshape(-1, layout.codes_per_frame)
