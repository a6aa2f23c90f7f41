"""Films to tokenise: all files of a folder, or the lines of a manifest.

A manifest is a file of JSON lines, one film or part of a film each:

  path      of the film, relative to the manifest's folder
  start     seconds after the film's first frame where the part begins (optional)
  end       seconds after the film's first frame where it ends (optional)
  captions  a text, or a list of texts of which one is drawn (optional)
  turns     a dialogue about the film: a list of {"role": ..., "content": text} (optional). The film
            stands where a message says <vision>; if none does, before the first user's message.
  content   in place of all of the above: an interleaved document, a list of texts and of films as
            {"path": ..., "start": ..., "end": ...}
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from lwm.data.sources import FileSource, Record
from lwm.errors import UserError
from lwm.vision.decoder_process import Clip

_CLIP_FIELDS = ("path", "start", "end")
_FIELDS = (*_CLIP_FIELDS, "captions", "turns", "content")


class Film(NamedTuple):
  """A film, a part of one, or an image; or an interleaved document; or the problem of an entry.

  Attributes:
    key: decides the split: the path below the input. All parts of a film have the same key.
    where: names the entry in the report.
    path: of the file; of the first film of an interleaved document.
    start: seconds after the first frame.
    end: seconds after the first frame; None is the end of the file.
    captions: alternatives.
    turns: messages of a dialogue, or None.
    content: texts and films of an interleaved document, in order.
    problem: why the entry is bad; empty if it is not.
  """

  key: str
  where: str
  path: str
  start: float = 0.0
  end: float | None = None
  captions: tuple[str, ...] = ()
  turns: list[dict[str, Any]] | None = None
  content: tuple[str | Clip, ...] = ()
  problem: str = ""

  @property
  def clips(self) -> list[Clip]:
    """What to decode, in the order of the document."""
    if self.content:
      return [item for item in self.content if isinstance(item, Clip)]
    return [Clip(self.path, self.start, self.end)]

  @property
  def source(self) -> str:
    """Folder of the film below the input, by which the dataset's manifest counts documents."""
    return os.path.dirname(self.key) or "."


def read_films(path: str | os.PathLike) -> list[Film]:
  """The films of a folder, in the order of their paths, or of a manifest, in its order.

  Every file of a folder and below is taken for a film, except hidden ones.

  Raises:
    UserError: `path` does not exist, or has no film.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise UserError(f"There is no input {path}: name a folder of films or a manifest.")
  films = list(_of_folder(path) if path.is_dir() else _of_manifest(path))
  if not films:
    raise UserError(f"{path} has no films: name a folder of films or a manifest.")
  return films


def digest(films: list[Film]) -> str:
  """A hash of all entries, to notice that an input has changed."""
  sha = hashlib.sha256()
  for film in films:
    sha.update(json.dumps(film).encode())
  return sha.hexdigest()


def _of_folder(folder: pathlib.Path) -> Iterator[Film]:
  known = set()
  for root, folders, files in os.walk(folder, followlinks=True):
    status = os.stat(root)
    if (status.st_dev, status.st_ino) in known:
      folders.clear()  # Another link to a folder, perhaps one above.
      continue
    known.add((status.st_dev, status.st_ino))
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    for name in sorted(name for name in files if not name.startswith(".")):
      path = pathlib.Path(root, name)
      yield Film(str(path.relative_to(folder)), str(path), str(path))


def _of_manifest(manifest: pathlib.Path) -> Iterator[Film]:
  for record in FileSource(manifest, "jsonl"):
    problem = record.problem or _problem(record.value)
    if problem:
      yield Film(record.key, record.where, "", problem=problem)
    else:
      yield _film(manifest, record)


def _film(manifest: pathlib.Path, record: Record) -> Film:
  value = record.value
  assert isinstance(value, dict)
  captions = value.get("captions") or ()
  content = tuple(
    item if isinstance(item, str) else _clip(manifest, item) for item in value.get("content") or ()
  )
  first = value if "path" in value else next(c for c in value["content"] if isinstance(c, dict))
  path, start, end = _clip(manifest, first)
  return Film(
    key=first["path"],
    where=f"{record.where}: {path}",
    path=path,
    start=start,
    end=end,
    captions=(captions,) if isinstance(captions, str) else tuple(captions),
    turns=value.get("turns"),
    content=content,
  )


def _clip(manifest: pathlib.Path, value: dict[str, Any]) -> Clip:
  end = value.get("end")
  return Clip(
    str(manifest.parent / value["path"]),
    float(value.get("start") or 0),
    None if end is None else float(end),
  )


def _problem(value: Any) -> str:
  """Why a line of a manifest is no film; empty if it is one. Messages are checked later."""
  unknown = [name for name in value if name not in _FIELDS]
  if unknown:
    return f"field {unknown[0]!r} is unknown; the fields are {', '.join(_FIELDS)}"
  if value.get("content") is not None:
    return _content_problem(value)
  problem = _clip_problem(value)
  if problem:
    return problem
  captions = value.get("captions") or ()
  if not isinstance(captions, str | list | tuple) or not all(isinstance(c, str) for c in captions):
    return "captions is neither a text nor a list of texts"
  if captions and value.get("turns"):
    return "it has captions and turns: give one of them"
  return ""


def _content_problem(value: dict[str, Any]) -> str:
  """Why a line of a manifest is no interleaved document; empty if it is one."""
  content = value["content"]
  if len(value) > 1:
    return "it has content and other fields: content takes their place"
  if not isinstance(content, list) or not all(isinstance(item, str | dict) for item in content):
    return "content is not a list of texts and films"
  films = [item for item in content if isinstance(item, dict)]
  if not films:
    return "content has no film"
  for film in films:
    unknown = [name for name in film if name not in _CLIP_FIELDS]
    if unknown:
      return f"field {unknown[0]!r} of a film is unknown; the fields are {', '.join(_CLIP_FIELDS)}"
  return next(filter(None, map(_clip_problem, films)), "")


def _clip_problem(value: dict[str, Any]) -> str:
  """Why path, start and end name no film; empty if they do."""
  if not isinstance(value.get("path"), str):
    return "there is no path"
  for name in ("start", "end"):
    number = value.get(name)
    if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
      return f"{name} is {number!r}, not a number of seconds"
  start, end = value.get("start") or 0, value.get("end")
  if start < 0 or (end is not None and end <= start):
    return f"the part from {start} s to {end} s is empty"
  return ""
