"""From the records of a source to a prepared dataset."""

import contextlib
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lwm.data.chat import ChatFormat
from lwm.data.dataset import TRAIN, VALIDATION
from lwm.data.documents import (
  BadDocument,
  Document,
  as_text,
  choose,
  get_field,
  record_document,
  text_document,
)
from lwm.data.sources import Record
from lwm.data.tokenizer import TextCollector, Tokenizer
from lwm.data.writer import DatasetParts
from lwm.errors import UserError

ToDocument = Callable[[Tokenizer, Record], Document]


def from_text(tokenizer: Tokenizer, record: Record) -> Document:
  """The document of a record that is a text."""
  assert isinstance(record.value, str)
  return text_document(tokenizer, record.value)


def from_text_field(name: str) -> ToDocument:
  """Documents of one text field."""

  def to_document(tokenizer: Tokenizer, record: Record) -> Document:
    return text_document(tokenizer, as_text(get_field(_fields(record), name), f"field {name!r}"))

  return to_document


def from_fields(
  fields: Sequence[str], fields_from: str, seed: int, max_frames: int | None = None
) -> ToDocument:
  """Documents of several fields, by LWM's fields specification (see `record_document`).

  Args:
    fields: alternatives, of which each record takes one; if empty, each record names its own.
    fields_from: the record's field with the specification, or a list of alternatives.
    seed: decides the choice among alternatives, together with the record's key.
    max_frames: frames to keep per field of vision codes, spread evenly; None keeps all.

  Raises:
    UserError: a specification in `fields` has an empty entry.
  """
  for specification in fields:
    if not all(name.strip(" []") for name in re.split("[,+]", specification)):
      raise UserError(f"--fields={specification!r} has an empty entry: name a field, or delete it.")

  def to_document(tokenizer: Tokenizer, record: Record) -> Document:
    value = _fields(record)
    alternatives: Any = fields or (fields_from in value and get_field(value, fields_from))
    if isinstance(alternatives, str):
      alternatives = [alternatives]
    if not _is_text_list(alternatives):
      raise BadDocument(
        f"field {fields_from!r} does not name the fields to take, so name them by --fields, "
        "--chat_field or --ids_field"
      )
    chosen = choose(alternatives, seed, record.key)
    return record_document(tokenizer, value, chosen, max_frames)

  return to_document


def from_ids(name: str) -> ToDocument:
  """Documents of a field of text ids, tokenised elsewhere with the same tokenizer.

  <bos> and <eos> are added where the ids do not begin and end with them.
  """

  def to_document(tokenizer: Tokenizer, record: Record) -> Document:
    ids = _ids(get_field(_fields(record), name), f"field {name!r}", tokenizer.vocab_size)
    bos = [] if ids[0] == tokenizer.bos_id else [tokenizer.bos_id]
    eos = [] if len(ids) > 1 and ids[-1] == tokenizer.eos_id else [tokenizer.eos_id]
    tokens = np.concatenate([bos, ids, eos]).astype(np.int32)
    return Document(tokens, np.arange(len(tokens)) > 0)

  return to_document


def from_chat(name: str) -> ToDocument:
  """Documents of a field of messages, by the tokenizer's chat template (see lwm/data/chat.py)."""
  formats: dict[int, ChatFormat] = {}

  def to_document(tokenizer: Tokenizer, record: Record) -> Document:
    if id(tokenizer) not in formats:
      formats[id(tokenizer)] = ChatFormat(tokenizer)
    return formats[id(tokenizer)].document(get_field(_fields(record), name))

  return to_document


def by_fraction(validation_fraction: float) -> Callable[[Record], str]:
  """The split that a record falls into by a hash of its key, the same in every run."""

  def split(record: Record) -> str:
    digest = hashlib.blake2b(os.fsencode(record.key), digest_size=8).digest()
    return VALIDATION if int.from_bytes(digest) < validation_fraction * 2**64 else TRAIN

  return split


class Writer(Protocol):
  """What documents are written to."""

  def write(self, split: str, document: Document, source: str = "") -> None: ...

  def bad(self, where: str, reason: str) -> None: ...


def add_documents(
  writer: Writer,
  records: Iterable[Record],
  tokenizer: Tokenizer,
  to_document: ToDocument,
  split: Callable[[Record], str],
) -> None:
  """Writes every good record to the split that `split` names, and reports the others."""
  for record in records:
    problem = record.problem
    if not problem:
      try:
        writer.write(split(record), to_document(tokenizer, record), record.source)
        continue
      except BadDocument as error:
        problem = str(error)
    writer.bad(record.where, problem)


def add_parts(
  parts: DatasetParts,
  inputs: Iterable[tuple[Iterable[Record], Callable[[Record], str]]],
  add: Callable[[Writer, Iterable[Record], Callable[[Record], str]], None],
  records_per_part: int,
  is_mine: Callable[[int], bool],
) -> int:
  """Makes parts of the records; those of complete parts and of others are only read.

  Args:
    parts: of the dataset.
    inputs: records, and the split of each.
    add: writes records to a part.
    records_per_part: in every part but the last of an input.
    is_mine: whether to make the part of a number.

  Returns:
    The number of all parts.
  """
  count = 0
  for records, split in inputs:
    numbered = enumerate(records)
    for _, batch in itertools.groupby(numbered, lambda item: item[0] // records_per_part):
      if is_mine(count) and not parts.is_complete(count):
        with parts.part(count) as part:
          add(part, (record for _, record in batch), split)
      count += 1
  return count


def training_texts(
  records: Iterable[Record], to_document: ToDocument, path: str | os.PathLike[str]
) -> Iterator[str]:
  """The texts that documents are made of, to train the tokenizer at `path` on.

  These are exactly the texts that `to_document` will encode. Other fields of a record, and records
  that cannot become a document, give none.
  """
  collector = TextCollector(pathlib.Path(path))
  for record in records:
    if not record.problem:
      collector.texts.clear()
      with contextlib.suppress(BadDocument):  # `add_documents` reports it.
        to_document(collector, record)
        yield from collector.texts


def _fields(record: Record) -> dict[str, Any]:
  assert isinstance(record.value, dict)
  return record.value


def _ids(value: Any, what: str, vocab_size: int) -> np.ndarray:
  """Ids of a list or array of integers in [0, vocab_size): int64 [L]. Raises BadDocument."""
  if isinstance(value, np.ndarray):
    kinds = {str(value.dtype)}
  elif isinstance(value, list):
    kinds = {type(item).__name__ for item in value}
  else:
    raise BadDocument(f"{what} is {type(value).__name__}, not a list of ids")
  others = sorted(kind for kind in kinds if not re.fullmatch(r"u?int\d*", kind))
  if others or np.ndim(value) != 1:
    raise BadDocument(f"{what} is a list of {' and '.join(others) or 'lists'}, not of ids")
  if not len(value):
    raise BadDocument("the document is empty")
  ids = np.asarray(value)
  for wrong in (ids.min(), ids.max()):
    if not 0 <= wrong < vocab_size:
      raise BadDocument(f"{what} holds {wrong}, which is no id of the tokenizer: [0, {vocab_size})")
  return ids.astype(np.int64)


def _is_text_list(value: Any) -> bool:
  return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) for v in value)
