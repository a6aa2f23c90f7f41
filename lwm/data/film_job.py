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
from lwm.data.film_documents import FilmCodes, FilmDocuments
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


class _ClipCodes:
  """A clip of an open part, and where the part's file has its codes."""

  def __init__(self) -> None:
    self.decoded_frames = 0
    self.encoded_frames = 0
    self.has_ended = False
    self.problem = ""
    # (first frame in the file, frames)
    self.blocks: list[tuple[int, int]] = []

  @property
  def is_complete(self) -> bool:
    # Frames of a bad film may still be at the encoder.
    return self.has_ended and self.encoded_frames == self.decoded_frames


@dataclasses.dataclass
class _Entry:
  """A document of an open part: its clips, or why its texts are bad."""

  film: Film
  text_problem: str
  template: Document | None
  clips: list[_ClipCodes]

  @property
  def is_complete(self) -> bool:
    return all(clip.is_complete for clip in self.clips)

  @property
  def problem(self) -> str:
    """Why the document is bad; empty if it is not. Does not depend on which clip ends first."""
    for source, clip in zip(self.film.clips, self.clips):
      if clip.problem:
        return f"{source.path}: {clip.problem}" if len(self.clips) > 1 else clip.problem
    return self.text_problem


class _Part:
  """A part whose films are being tokenised. Their codes wait in a file without a name."""

  def __init__(self, number: int, entries: list[_Entry], directory: pathlib.Path, width: int):
    self.number = number
    self.entries = entries
    self.frames = 0
    self._width = width
    self._file, name = tempfile.mkstemp(dir=directory)
    os.unlink(name)

  def append(self, clip: _ClipCodes, codes_NxP: np.ndarray) -> None:
    os.write(self._file, codes_NxP.astype(np.int32).tobytes())
    clip.blocks.append((self.frames, len(codes_NxP)))
    clip.encoded_frames += len(codes_NxP)
    self.frames += len(codes_NxP)

  def codes(self, clip: _ClipCodes) -> FilmCodes:
    return FilmCodes(clip.encoded_frames, self._read(clip))

  def _read(self, clip: _ClipCodes) -> Iterator[np.ndarray]:
    frame_bytes = self._width * np.dtype(np.int32).itemsize
    for first, count in clip.blocks:
      content = os.pread(self._file, count * frame_bytes, first * frame_bytes)
      yield np.frombuffer(content, np.int32).reshape(count, self._width)

  def close(self) -> None:
    os.close(self._file)


class _Place(NamedTuple):
  """Where the frames go that come from a decoder or the encoder."""

  part: _Part
  clip: _ClipCodes


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
    # By the number that a clip has at the decoders and the encoder.
    self._at_work: dict[int, _Place] = {}

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
      clip = self._at_work[decoded.film].clip
      if decoded.frames_NxHxWx3 is not None:
        clip.decoded_frames += len(decoded.frames_NxHxWx3)
        self._take(encoder.add(decoded.film, decoded.frames_NxHxWx3))
      else:
        clip.has_ended, clip.problem = True, decoded.problem
      self._write_complete(report)
    self._take(encoder.flush())
    self._write_complete(report)

  def _clips(self, numbers: Iterable[int]) -> Iterator[tuple[int, Clip]]:
    """The clips to decode, each with a number; opens each part at its first clip."""
    clip_number = 0
    for number in numbers:
      first = number * self._films_per_part
      entries = [self._entry(film) for film in self._films[first : first + self._films_per_part]]
      width = self._documents.codes_per_frame
      part = self._open[number] = _Part(number, entries, self._parts.directory, width)
      for entry in entries:
        for clip, codes in zip(entry.film.clips, entry.clips):
          self._at_work[clip_number] = _Place(part, codes)
          yield clip_number, clip
          clip_number += 1

  def _entry(self, film: Film) -> _Entry:
    problem, template = film.problem, None
    if not problem:
      try:
        template = self._documents.template(film)
      except BadDocument as error:
        problem = str(error)
    return _Entry(film, problem, template, [] if problem else [_ClipCodes() for _ in film.clips])

  def _take(self, encoded: Iterable[Codes]) -> None:
    for number, codes_NxP in encoded:
      part, clip = self._at_work[number]
      part.append(clip, codes_NxP)

  def _write_complete(self, report: Callable[[PartReport], None]) -> None:
    complete = [
      part for part in self._open.values() if all(entry.is_complete for entry in part.entries)
    ]
    for part in complete:
      with self._parts.part(part.number) as writer:
        for entry in part.entries:
          if entry.template is None or entry.problem:
            writer.bad(entry.film.where, entry.problem)
            continue
          clips = [part.codes(clip) for clip in entry.clips]
          pieces = self._documents.pieces(entry.template, clips)
          film = entry.film
          split = self._split(Record(film.key, film.where, film.source, None))
          writer.write_pieces(split, pieces, film.source)
      part.close()
      self._at_work = {n: place for n, place in self._at_work.items() if place.part is not part}
      bad = sum(bool(entry.problem) for entry in part.entries)
      report(PartReport(part.number, len(part.entries), bad, part.frames))
      del self._open[part.number]
