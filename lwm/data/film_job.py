"""From films to the parts of a dataset: decode, encode, write.

N frames, P codes per frame.
"""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lwm.data import prepare
from lwm.data.documents import BadDocument, Document
from lwm.data.film_documents import FilmDocuments
from lwm.data.films import Film
from lwm.data.sources import Record
from lwm.data.writer import DatasetParts
from lwm.vision.decoder_process import Clip
from lwm.vision.decoders import Decoders
from lwm.vision.frame_encoder import Codes, FrameEncoder


class PartReport(NamedTuple):
  """What a completed part holds."""

  number: int
  films: int
  bad_films: int
  frames: int


@dataclasses.dataclass
class _Entry:
  """A film of an open part, and where the part's file has its codes."""

  film: Film
  problem: str
  template: Document | None
  decoded_frames: int = 0
  encoded_frames: int = 0
  ended: bool = False
  # (first frame in the file, frames)
  blocks: list[tuple[int, int]] = dataclasses.field(default_factory=list)

  @property
  def complete(self) -> bool:
    # Frames of a bad film may still be at the encoder.
    decoded = self.ended and self.encoded_frames == self.decoded_frames
    return self.template is None or decoded


class _Part:
  """A part whose films are being tokenised. Their codes wait in a file without a name."""

  def __init__(self, number: int, entries: list[_Entry], directory: pathlib.Path, width: int):
    self.number = number
    self.entries = entries
    self.frames = 0
    self._width = width
    self._file, name = tempfile.mkstemp(dir=directory)
    os.unlink(name)

  def append(self, entry: _Entry, codes_NxP: np.ndarray) -> None:
    os.write(self._file, codes_NxP.astype(np.int32).tobytes())
    entry.blocks.append((self.frames, len(codes_NxP)))
    entry.encoded_frames += len(codes_NxP)
    self.frames += len(codes_NxP)

  def read(self, entry: _Entry) -> Iterator[np.ndarray]:
    frame_bytes = self._width * np.dtype(np.int32).itemsize
    for first, count in entry.blocks:
      content = os.pread(self._file, count * frame_bytes, first * frame_bytes)
      yield np.frombuffer(content, np.int32).reshape(count, self._width)

  def close(self) -> None:
    os.close(self._file)


class FilmJob:
  """Tokenises films part by part; the films of part i are [i F, (i + 1) F), F films per part."""

  def __init__(
    self,
    films: Sequence[Film],
    films_per_part: int,
    parts: DatasetParts,
    documents: FilmDocuments,
    validation_fraction: float,
  ):
    """
    Args:
      films: all films of the input.
      films_per_part: in every part but the last.
      parts: of the dataset to write.
      documents: makes the documents.
      validation_fraction: share of the films to hold out.
    """
    self._films = films
    self._films_per_part = films_per_part
    self._parts = parts
    self._documents = documents
    self._split = prepare.by_fraction(validation_fraction)
    self._open: dict[int, _Part] = {}

  def run(
    self,
    numbers: Iterable[int],
    decoders: Decoders,
    encoder: FrameEncoder,
    report: Callable[[PartReport], None],
  ) -> None:
    """Makes parts.

    Args:
      numbers: of the parts, in increasing order.
      decoders: decode the films.
      encoder: makes their codes.
      report: is called for each completed part.
    """
    for decoded in decoders.decode(self._clips(numbers)):
      part, entry = self._find(decoded.film)
      if decoded.frames_NxHxWx3 is not None:
        entry.decoded_frames += len(decoded.frames_NxHxWx3)
        self._take(encoder.add(decoded.film, decoded.frames_NxHxWx3))
      else:
        entry.ended, entry.problem = True, decoded.problem
      self._write_complete(report)
    self._take(encoder.flush())
    self._write_complete(report)

  def _clips(self, numbers: Iterable[int]) -> Iterator[tuple[int, Clip]]:
    """The films to decode, by their indices; opens each part at its first film."""
    for number in numbers:
      first = number * self._films_per_part
      entries = [self._entry(film) for film in self._films[first : first + self._films_per_part]]
      width = self._documents.codes_per_frame
      self._open[number] = _Part(number, entries, self._parts.directory, width)
      for index, entry in enumerate(entries, start=first):
        if not entry.problem:
          yield index, Clip(entry.film.path, entry.film.start, entry.film.end)

  def _entry(self, film: Film) -> _Entry:
    problem, template = film.problem, None
    if not problem:
      try:
        template = self._documents.template(film)
      except BadDocument as error:
        problem = str(error)
    return _Entry(film, problem, template)

  def _find(self, index: int) -> tuple[_Part, _Entry]:
    part = self._open[index // self._films_per_part]
    return part, part.entries[index % self._films_per_part]

  def _take(self, encoded: Iterable[Codes]) -> None:
    for index, codes_NxP in encoded:
      part, entry = self._find(index)
      part.append(entry, codes_NxP)

  def _write_complete(self, report: Callable[[PartReport], None]) -> None:
    complete = [
      part for part in self._open.values() if all(entry.complete for entry in part.entries)
    ]
    for part in complete:
      with self._parts.part(part.number) as writer:
        for entry in part.entries:
          if entry.template is None or entry.problem:
            writer.bad(entry.film.where, entry.problem)
            continue
          pieces = self._documents.pieces(entry.template, entry.encoded_frames, part.read(entry))
          film = entry.film
          split = self._split(Record(film.key, film.where, film.source, None))
          writer.write_pieces(split, pieces, film.source)
      part.close()
      bad = sum(bool(entry.problem) for entry in part.entries)
      report(PartReport(part.number, len(part.entries), bad, part.frames))
      del self._open[part.number]
