"""Documents as tokens: text and frames joined into one sequence of ids, with a loss mask.

L tokens of a document, N frames of P = 256 codes.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lwm.data.tokenizer import TextError, Tokenizer
from lwm.data.vision_tokens import CODES_PER_FRAME, VISION_END, VISION_START, frame_tokens


class BadDocument(ValueError):
  """A record that cannot be made a document; the message is the reason, for the report."""


class Document(NamedTuple):
  """Ids of one document, and which of them count in the loss when they are the target."""

  # int32 [L]: text ids, and vision ids offset by the text vocabulary.
  tokens: np.ndarray
  # bool [L]
  loss_mask: np.ndarray


class DocumentBuilder:
  """Joins pieces into a Document. `loss` says whether the piece's tokens count as targets."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._tokens = []
    self._loss = []

  def _append(self, ids: Sequence[int] | np.ndarray, loss: bool) -> "DocumentBuilder":
    ids = np.asarray(ids, np.int32)
    self._tokens.append(ids)
    self._loss.append(np.full(len(ids), loss))
    return self

  def bos(self, loss: bool = False) -> "DocumentBuilder":
    return self._append([self._tokenizer.bos_id], loss)

  def eos(self, loss: bool = True) -> "DocumentBuilder":
    return self._append([self._tokenizer.eos_id], loss)

  def text(self, text: str, loss: bool = True) -> "DocumentBuilder":
    """Appends a text; the name of a mark in it is text too.

    Raises BadDocument for a text that cannot be encoded, such as half of a surrogate pair.
    """
    try:
      return self._append(self._tokenizer.encode(text), loss)
    except TextError as error:
      raise BadDocument(str(error)) from error

  def _mark(self, name: str, loss: bool) -> "DocumentBuilder":
    """Appends a mark; one that the tokenizer does not have is spelled as text, as LWM does."""
    mark = self._tokenizer.marks.get(name)
    return self.text(name, loss) if mark is None else self._append([mark], loss)

  def vision(
    self, codes_NxP: np.ndarray, loss: bool = True, marks_loss: bool | None = None
  ) -> "DocumentBuilder":
    """<vision>, the frames (see `frame_tokens`), </vision>; `marks_loss` is `loss` unless given.

    Raises BadDocument for bad codes.
    """
    marks_loss = loss if marks_loss is None else marks_loss
    try:
      frames = frame_tokens(codes_NxP)
    except ValueError as error:
      raise BadDocument(str(error)) from error
    self._mark(VISION_START, marks_loss)
    self._append(self._tokenizer.vocab_size + frames, loss)
    return self._mark(VISION_END, marks_loss)

  def build(self) -> Document:
    return Document(np.concatenate(self._tokens), np.concatenate(self._loss))


def text_document(tokenizer: Tokenizer, text: str) -> Document:
  """<bos> text <eos>. Raises BadDocument if the text is empty or blank."""
  if not text.strip():
    raise BadDocument("the document is empty")
  return DocumentBuilder(tokenizer).bos().text(text).eos().build()


def video_document(tokenizer: Tokenizer, codes_NxP: np.ndarray, caption: str = "") -> Document:
  """<bos> caption <vision> frames </vision> <eos>; only the frames count in the loss.

  Where a clip begins and ends is for the sampler to say; and the few marks of a batch of films
  would otherwise make up all of its text loss.
  """
  builder = DocumentBuilder(tokenizer).bos()
  if caption:
    builder.text(caption, loss=False)
  return builder.vision(codes_NxP, marks_loss=False).eos(loss=False).build()


def record_document(tokenizer: Tokenizer, record: dict[str, Any], fields: str) -> Document:
  """A JSON record as a document, by LWM's fields specification (LWM, `lwm/data.py`).

  `fields` is a comma-separated list, put between a <bos> without loss and an <eos> with:

    name             the text of that field of the record
    a+b              both texts joined by one space and tokenised together
    [name], [a+b]    the same without loss
    <|bos|> <|eos|>  that mark (in brackets: without loss)
    name with the word `vision` in it
                     codes, a list of ints [256 N] or of lists [N, 256] in [0, 8192), surrounded by
                     <vision> and </vision>, frames ended as `frame_tokens` says; it may also be
                     joined by `+` to texts, which then stand before or after it

  Raises:
    BadDocument: a field is missing or of the wrong type, a code is out of range, or all is blank.
  """
  builder = DocumentBuilder(tokenizer).bos()
  empty = True
  for field in fields.split(","):
    field = field.strip()
    loss = not (field.startswith("[") and field.endswith("]"))
    if not loss:
      field = field[1:-1]
    if field == "<|bos|>":
      builder.bos(loss)
      continue
    if field == "<|eos|>":
      builder.eos(loss)
      continue
    texts = []
    for name in field.split("+"):
      if "vision" in name:
        if texts:
          builder.text(" ".join(texts), loss)
        texts = []
        builder.vision(_codes(record, name), loss)
        empty = False
      else:
        texts.append(as_text(get_field(record, name), f"field {name!r}"))
    if texts:
      text = " ".join(texts)
      builder.text(text, loss)
      empty = empty and not text.strip()
  if empty:
    raise BadDocument("the document is empty")
  return builder.eos().build()


def choose(alternatives: Sequence[str], seed: int, where: str) -> str:
  """One of the alternatives, evenly, by a hash of the seed and of where the record stands."""
  digest = hashlib.blake2b(os.fsencode(f"{seed}/{where}"), digest_size=8).digest()
  return alternatives[int.from_bytes(digest) % len(alternatives)]


def get_field(record: dict[str, Any], name: str) -> Any:
  """A field of a record. Raises BadDocument if the record has no field of that name."""
  if name not in record:
    raise BadDocument(f"there is no field {name!r}")
  return record[name]


def as_text(value: Any, what: str) -> str:
  """A text, given as such or as UTF-8 bytes. `what` names it in the BadDocument for all else."""
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError as error:
      byte = value[error.start]
      raise BadDocument(f"{what} is not UTF-8: byte 0x{byte:02x} at {error.start}") from error
  if not isinstance(value, str):
    raise BadDocument(f"{what} is {type(value).__name__}, not text")
  return value


def _codes(record: dict[str, Any], name: str) -> np.ndarray:
  value = get_field(record, name)
  try:
    codes = np.asarray(value)
  except ValueError as error:
    raise BadDocument(f"field {name!r} is a ragged list, not frames of codes") from error
  if codes.ndim == 1 and codes.size % CODES_PER_FRAME == 0:
    codes = codes.reshape(-1, CODES_PER_FRAME)
  if codes.dtype.kind not in "iu" or not codes.size:
    raise BadDocument(f"field {name!r} is no list of vision codes")
  return codes
