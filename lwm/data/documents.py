"""Documents as tokens: text and frames joined into one sequence of ids, with a loss mask.

L tokens of a document, N frames, P codes per frame.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from lwm.config.vqgan import LWM_LAYOUT, VisionLayout
from lwm.data.sources import Problem
from lwm.data.tokenizer import TextError, Tokenizer
from lwm.data.vision_tokens import VISION_END, VISION_START, evenly_spaced, frame_tokens


class BadDocument(ValueError):
  """A record that cannot become a document. The message is the reason, for the report."""


class Document(NamedTuple):
  """The ids of one document, and which of them count in the loss when they are the target."""

  # int32 [L]: text ids, and vision ids offset by the number of text ids.
  tokens: np.ndarray
  # bool [L]
  loss_mask: np.ndarray


class DocumentBuilder:
  """Joins pieces into a Document. `loss` says whether a piece's tokens count as targets."""

  def __init__(self, tokenizer: Tokenizer, layout: VisionLayout = LWM_LAYOUT):
    """
    Args:
      tokenizer: encodes the text.
      layout: of the VQGAN that the vision codes come from.
    """
    self._tokenizer = tokenizer
    self._layout = layout
    self._tokens: list[np.ndarray] = []
    self._loss: list[np.ndarray] = []

  def _append(self, ids: Sequence[int] | np.ndarray, loss: bool) -> Self:
    tokens = np.asarray(ids, np.int32)
    self._tokens.append(tokens)
    self._loss.append(np.full(len(tokens), loss))
    return self

  def bos(self, loss: bool = False) -> Self:
    return self._append([self._tokenizer.bos_id], loss)

  def eos(self, loss: bool = True) -> Self:
    return self._append([self._tokenizer.eos_id], loss)

  def text(self, text: str, loss: bool = True) -> Self:
    """Appends a text; the name of a mark in it is text too.

    Raises BadDocument for a text that cannot be encoded, such as half of a surrogate pair.
    """
    try:
      return self._append(self._tokenizer.encode(text), loss)
    except TextError as error:
      raise BadDocument(str(error)) from error

  def _mark(self, name: str, loss: bool) -> Self:
    """Appends a mark; one that the tokenizer does not have is spelled as text, as LWM does."""
    mark = self._tokenizer.marks.get(name)
    return self.text(name, loss) if mark is None else self._append([mark], loss)

  def vision(
    self, codes_NxP: np.ndarray, loss: bool = True, marks_loss: bool | None = None
  ) -> Self:
    """Appends <vision>, the frames (see `frame_tokens`) and </vision>.

    Args:
      codes_NxP: integers.
      loss: whether the tokens of the frames count as targets.
      marks_loss: whether <vision> and </vision> do; the same as `loss` if None.

    Raises:
      BadDocument: the codes do not fit the layout.
    """
    marks_loss = loss if marks_loss is None else marks_loss
    try:
      frames = frame_tokens(codes_NxP, self._layout)
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


def video_document(
  tokenizer: Tokenizer,
  codes_NxP: np.ndarray,
  caption: str = "",
  layout: VisionLayout = LWM_LAYOUT,
  caption_last: bool = False,
) -> Document:
  """A pair of a caption and a clip. Only what comes second counts in the loss.

  The document is <bos> caption <vision> frames </vision> <eos>, or with `caption_last`
  <bos> <vision> frames </vision> caption <eos>. Without a caption, only the frames count.

  Beside frames that count, the marks and <eos> do not: the sampler decides where a clip begins and
  ends, and in a batch of films the few marks would otherwise be the whole text loss.

  Raises:
    BadDocument: the codes do not fit the layout.
  """
  builder = DocumentBuilder(tokenizer, layout).bos()
  if caption and caption_last:
    return builder.vision(codes_NxP, loss=False).text(caption).eos().build()
  if caption:
    builder.text(caption, loss=False)
  return builder.vision(codes_NxP, marks_loss=False).eos(loss=False).build()


def record_document(
  tokenizer: Tokenizer, record: dict[str, Any], fields: str, max_frames: int | None = None
) -> Document:
  """A JSON record as a document, by LWM's fields specification (LWM, `lwm/data.py`).

  `fields` is a comma-separated list. The document is a <bos> without loss, the listed fields in
  order, and an <eos> with loss:

    name             the text of that field of the record
    a+b              both texts, joined by one space and tokenised together
    [name], [a+b]    the same without loss
    <|bos|> <|eos|>  that mark (in brackets: without loss)
    name with the word `vision` in it
                     codes of LWM's VQGAN, a list of ints [N P] or of lists [N, P], surrounded by
                     <vision> and </vision>, with end marks as in `frame_tokens`; `+` may join it to
                     texts, which then come before or after it. Of more than `max_frames` frames, so
                     many are kept, spread evenly.

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
    texts: list[str] = []
    for name in field.split("+"):
      if "vision" in name:
        if texts:
          builder.text(" ".join(texts), loss)
        texts = []
        codes_NxP = _codes(record, name)
        builder.vision(codes_NxP[evenly_spaced(len(codes_NxP), max_frames)], loss)
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
  """One of the alternatives, chosen evenly by a hash of the seed and the record's place."""
  return alternatives[_hash(seed, where) % len(alternatives)]


def happens(probability: float, seed: int, where: str) -> bool:
  """Whether an event happens, decided by a hash of the seed and the record's place."""
  return _hash(seed, where) < probability * 2**64


def _hash(seed: int, where: str) -> int:
  """A number in [0, 2^64)."""
  digest = hashlib.blake2b(os.fsencode(f"{seed}/{where}"), digest_size=8).digest()
  return int.from_bytes(digest)


def get_field(record: dict[str, Any], name: str) -> Any:
  """A field of a record. Raises BadDocument if it does not exist or could not be read."""
  if name not in record:
    raise BadDocument(f"there is no field {name!r}")
  if isinstance(record[name], Problem):
    raise BadDocument(f"field {name!r}: {record[name].reason}")
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
  if codes.ndim == 1 and codes.size % LWM_LAYOUT.codes_per_frame == 0:
    codes = codes.reshape(-1, LWM_LAYOUT.codes_per_frame)
  if codes.dtype.kind not in "iu" or not codes.size:
    raise BadDocument(f"field {name!r} is not a list of vision codes")
  return codes
