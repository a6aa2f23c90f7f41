"""From a source's records to a prepared dataset."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lwm.data.dataset import TRAIN, VALIDATION
from lwm.data.documents import BadDocument, Document, choose, record_document, text_document
from lwm.data.sources import Record
from lwm.data.tokenizer import Tokenizer
from lwm.data.writer import DatasetWriter
from lwm.errors import UserError

ToDocument = Callable[[Tokenizer, Record], Document]


def from_text(tokenizer: Tokenizer, record: Record) -> Document:
  """The document of a record that is a text."""
  return text_document(tokenizer, record.value)


def from_fields(fields: Sequence[str], fields_from: str, seed: int) -> ToDocument:
  """Documents of JSON records, by LWM's fields specification (see `record_document`).

  Args:
    fields: alternatives, of which each record takes one; if empty, the record says itself.
    fields_from: the record's field with the specification, or a list of alternatives.
    seed: of the choice among alternatives, which also hangs on where the record stands.
  """

  def to_document(tokenizer: Tokenizer, record: Record) -> Document:
    alternatives = fields or record.value.get(fields_from)
    if isinstance(alternatives, str):
      alternatives = [alternatives]
    if not _is_text_list(alternatives):
      raise BadDocument(f"field {fields_from!r} is no fields specification, nor a list of them")
    chosen = choose(alternatives, seed, record.key)
    return record_document(tokenizer, record.value, chosen)

  return to_document


def by_fraction(validation_fraction: float) -> Callable[[Record], str]:
  """The split that a record falls into by a hash of its key, the same in every run."""

  def split(record: Record) -> str:
    digest = hashlib.blake2b(os.fsencode(record.key), digest_size=8).digest()
    return VALIDATION if int.from_bytes(digest) < validation_fraction * 2**64 else TRAIN

  return split


def add_documents(
  writer: DatasetWriter,
  records: Iterable[Record],
  tokenizer: Tokenizer,
  to_document: ToDocument,
  split: Callable[[Record], str],
) -> None:
  """Writes every good record into the split that `split` names, and reports the others.

  Raises:
    UserError: there is no good record.
  """
  good = 0
  first_bad = ""
  for record in records:
    problem = record.problem
    if not problem:
      try:
        writer.write(split(record), to_document(tokenizer, record), record.source)
        good += 1
        continue
      except BadDocument as error:
        problem = str(error)
    writer.bad(record.where, problem)
    first_bad = first_bad or f"; the first: {record.where}: {problem}"
  if not good:
    raise UserError(f"No good document in the input, {writer.bad_records} bad ones{first_bad}.")


def texts(records: Iterable[Record], fields_from: str) -> Iterator[str]:
  """The texts in records, to train a tokenizer on: all text fields of a JSON record but one."""
  for record in records:
    if isinstance(record.value, str):
      yield record.value
    elif record.value:
      for name, value in record.value.items():
        if isinstance(value, str) and name != fields_from:
          yield value


def _is_text_list(value: Any) -> bool:
  return isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value)
