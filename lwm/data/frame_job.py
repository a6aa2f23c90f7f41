"""From films and images to the parts of a dataset of frames.

N frames, H and W height and width in pixels.
"""

import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from lwm.data import prepare
from lwm.data.dataset import TRAIN, VALIDATION
from lwm.data.film_job import PartReport
from lwm.data.films import Film
from lwm.data.frame_parts import FrameParts, FramePartWriter
from lwm.data.sources import Record
from lwm.vision.decoder_process import Clip
from lwm.vision.decoders import Decoders


def single_clips(films: Iterable[Film]) -> list[Film]:
  """The same films, with each film of an interleaved document as one of its own."""
  return [
    Film(film.key, film.where, *clip, problem=film.problem) for film in films for clip in film.clips
  ]


class _OpenFilm:
  """A film that is being decoded. Its frames wait in a file, because it may turn out to be bad."""

  def __init__(self, film: Film, directory: pathlib.Path):
    self.film, self.problem = film, film.problem
    self.ended = bool(film.problem)
    self.num_frames = 0
    self._shape: tuple[int, ...] = ()
    self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115

  def append(self, frames_NxHxWx3: np.ndarray) -> None:
    self._shape = frames_NxHxWx3.shape[1:]
    self._file.write(frames_NxHxWx3.tobytes())
    self.num_frames += len(frames_NxHxWx3)

  def frames(self) -> Iterator[np.ndarray]:
    self._file.seek(0)
    for _ in range(self.num_frames):
      yield np.frombuffer(self._file.read(int(np.prod(self._shape))), np.uint8).reshape(self._shape)

  def close(self) -> None:
    self._file.close()


class FrameJob:
  """Takes frames of films part by part; the films of part i are [i F, (i + 1) F).

  F is the number of films per part.
  """

  def __init__(
    self, films: Sequence[Film], films_per_part: int, parts: FrameParts, held_out: float
  ):
    """
    Args:
      films: all films of the input; see `single_clips`.
      films_per_part: in every part but the last.
      parts: of the dataset to write.
      held_out: share of each film, at its end, to hold out. Of films of one frame, such as images,
        this share is held out, chosen by hash of their paths.
    """
    self._films = films
    self._films_per_part = films_per_part
    self._parts = parts
    self._held_out = held_out
    self._split = prepare.by_fraction(held_out)
    self._open: dict[int, list[_OpenFilm]] = {}

  def run(
    self, numbers: Iterable[int], decoders: Decoders, report: Callable[[PartReport], None]
  ) -> None:
    """Makes parts.

    Args:
      numbers: of the parts, in increasing order.
      decoders: decode the films.
      report: is called for each completed part.
    """
    for index, frames_NxHxWx3, problem in decoders.decode(self._clips(numbers)):
      film = self._open[index // self._films_per_part][index % self._films_per_part]
      if frames_NxHxWx3 is not None:
        film.append(frames_NxHxWx3)
      else:
        film.ended, film.problem = True, problem
        self._write_complete(report)
    self._write_complete(report)  # Parts without a film to decode.

  def _clips(self, numbers: Iterable[int]) -> Iterator[tuple[int, Clip]]:
    """The films to decode, by their indices; opens each part at its first film."""
    for number in numbers:
      first = number * self._films_per_part
      films = self._films[first : first + self._films_per_part]
      self._open[number] = [_OpenFilm(film, self._parts.directory) for film in films]
      for index, film in enumerate(films, start=first):
        if not film.problem:
          yield index, Clip(film.path, film.start, film.end)

  def _write_complete(self, report: Callable[[PartReport], None]) -> None:
    complete = [n for n, films in self._open.items() if all(film.ended for film in films)]
    for number in complete:
      films = self._open.pop(number)
      with self._parts.part(number) as writer:
        for film in films:
          self._write(writer, film)
          film.close()
      bad = sum(bool(film.problem) for film in films)
      frames = sum(film.num_frames for film in films if not film.problem)
      report(PartReport(number, len(films), bad, frames))

  def _write(self, writer: FramePartWriter, open_film: _OpenFilm) -> None:
    film, count = open_film.film, open_film.num_frames
    if open_film.problem:
      writer.bad(film.where, open_film.problem)
      return
    first_held_out = count - round(count * self._held_out)
    if count == 1:
      record = Record(film.key, film.where, film.source, None)
      first_held_out = int(self._split(record) == TRAIN)
    for index, frame_HxWx3 in enumerate(open_film.frames()):
      writer.write(TRAIN if index < first_held_out else VALIDATION, frame_HxWx3)
