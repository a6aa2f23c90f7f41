"""Text tokenizers from a file: sentencepiece `*.model` and Hugging Face `tokenizer.json`."""

import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import sentencepiece
import tokenizers

from lwm.data.vision_tokens import VISION_END, VISION_START
from lwm.errors import UserError

# Pairs (first, last) by which the families of models mark a document, tried in this order.
_MARKS = (
  ("<bos>", "<eos>"),
  ("<s>", "</s>"),
  ("<|begin_of_text|>", "<|end_of_text|>"),
  ("<|endoftext|>", "<|endoftext|>"),
)
# Matches, in the bytes of a sentencepiece model, <vision> or </vision>, its score, and the type
# "user-defined". With the type "unused", no text becomes such a piece, but decoding shows it.
_VISION_SYMBOLS = re.compile(rb"(\n(?:\x08<vision>|\t</vision>)\x15.{4}\x18)\x04", re.DOTALL)
_UNUSED = b"\x05"
# Files that belong to a tokenizer's file, beside it. Only exports use special_tokens_map.json.
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
SETTINGS_FILES = (TOKENIZER_CONFIG, CHAT_TEMPLATE, "special_tokens_map.json", GENERATION_CONFIG)
# Longer lines, in characters, are split: the trainer leaves out lines of more than a mebibyte.
_LONGEST_LINE = 1 << 14
# The trainer uses this character internally, and leaves out every line that contains it.
_RESERVED = "\u2585"


class TextError(UserError):
  """A text that a tokenizer cannot encode as text."""


class Tokenizer(Protocol):
  """What the rest of the library asks of a tokenizer.

  Text is text: `encode` adds no <bos> or <eos>, and if a text contains the name of a mark, such as
  <eos>, it spells the name out. Only the code that builds documents makes marks, from their ids.
  """

  path: pathlib.Path
  # SHA-256 of the tokenizer's file; prepared datasets and checkpoints record it.
  sha256: str
  vocab_size: int
  bos_id: int
  eos_id: int
  # The ids, by name, of the tokens that no text becomes: <bos>, <|im_start|>, and so on. They
  # include <vision> and </vision> if the tokenizer has these as one token each.
  marks: dict[str, int]

  def encode(self, text: str) -> list[int]:
    """The ids of a text. Raises TextError for a text that cannot be encoded as text."""
    ...

  def encode_spans(self, text: str, with_marks: bool) -> list[tuple[int, int, int]]:
    """The ids of a text, each with the range of characters (start, stop) that it stands for.

    If several tokens spell one character, any of them may have it in its range.

    Args:
      text: as for `encode`.
      with_marks: whether names of marks become marks. Only for text that a chat template wrote.

    Raises:
      TextError: the text cannot be encoded as text.
    """
    ...

  def decode(self, ids: Sequence[int]) -> str: ...


class SentencePieceTokenizer:
  """A sentencepiece model, as Llama 2 and LWM use."""

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self.sha256 = file_sha256(self.path)
    # In models that we train, <vision> and </vision> are symbols that any text can produce.
    model = _VISION_SYMBOLS.sub(rb"\g<1>" + _UNUSED, self.path.read_bytes())
    self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.vocab_size = self._model.get_piece_size()
    self.bos_id = self._model.bos_id()
    self.eos_id = self._model.eos_id()
    if self.bos_id < 0 or self.eos_id < 0:
      raise UserError(f"Tokenizer {path} has no beginning-of-text or no end-of-text piece.")
    self.marks = {
      self._model.id_to_piece(index): index
      for index in range(self.vocab_size)
      if self._model.is_control(index) or self._model.is_unused(index)
    }

  def encode(self, text: str) -> list[int]:
    check_text(text)
    return self._model.encode(text)

  def encode_spans(self, text: str, with_marks: bool) -> list[tuple[int, int, int]]:
    check_text(text)
    spans = []
    start = 0
    for part in mark_pattern(self.marks).split(text) if with_marks else [text]:
      if with_marks and part in self.marks:
        spans.append((self.marks[part], start, start + len(part)))
      else:
        spans += self._text_spans(part, start)
      start += len(part)
    return spans

  def _text_spans(self, text: str, start: int) -> Iterator[tuple[int, int, int]]:
    encoded = text.encode("utf-8")
    previous = 0
    # The library counts bytes. If several pieces spell one character, the last has its range.
    for piece in self._model.encode(text, return_type="proto").pieces:
      start += len(encoded[previous : piece.begin].decode("utf-8"))
      previous = piece.begin
      length = len(encoded[piece.begin : piece.end].decode("utf-8"))
      yield piece.id, start, start + length

  def decode(self, ids: Sequence[int]) -> str:
    return self._model.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
  """A `tokenizer.json`; `tokenizer_config.json` beside it names <bos> and <eos> if it exists."""

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self.sha256 = file_sha256(self.path)
    self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
    # The file keeps the settings of the program that saved it.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    # A post-processor removes spaces from the ranges; otherwise it only adds special tokens.
    self._tokenizer.post_processor = None
    # Not the number of its pieces: ids may have gaps.
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = 1 + max(vocabulary.values())
    self.bos_id, self.eos_id = self._find_marks()
    self.marks = self._make_marks_special()
    self._mark_ids = frozenset(self.marks.values())

  def _find_marks(self) -> tuple[int, int]:
    settings = read_settings(self.path)
    named = tuple(token_name(settings.get(name)) for name in ("bos_token", "eos_token"))
    for pair in [named, *_MARKS]:
      bos_id, eos_id = (self._tokenizer.token_to_id(mark) if mark else None for mark in pair)
      if bos_id is not None and eos_id is not None:
        return bos_id, eos_id
    raise UserError(
      f"Tokenizer {self.path} has none of the known begin and end marks: put a "
      "tokenizer_config.json that names bos_token and eos_token beside it."
    )

  def _make_marks_special(self) -> dict[str, int]:
    """Makes every mark a special token, and keeps text from becoming one. Returns ids by name."""
    added = self._tokenizer.get_added_tokens_decoder()
    special = {token.content: index for index, token in added.items() if token.special}
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    named = {name for name, index in vocabulary.items() if index in (self.bos_id, self.eos_id)}
    for name in (named | {VISION_START, VISION_END}) & vocabulary.keys() - special.keys():
      self._tokenizer.add_special_tokens([name])
      special[name] = vocabulary[name]
    self._tokenizer.encode_special_tokens = True
    # Text becomes the unknown token where the vocabulary lacks a character.
    unknown = {"<unk>", "[UNK]", getattr(self._tokenizer.model, "unk_token", None)} - named
    return {name: index for name, index in special.items() if name not in unknown}

  def encode(self, text: str) -> list[int]:
    return self._encode(text).ids

  def encode_spans(self, text: str, with_marks: bool) -> list[tuple[int, int, int]]:
    if not with_marks:
      encoded = self._encode(text)
    else:
      check_text(text)
      self._tokenizer.encode_special_tokens = False
      encoded = self._tokenizer.encode(text, add_special_tokens=False)
      self._tokenizer.encode_special_tokens = True
    return [(index, *span) for index, span in zip(encoded.ids, encoded.offsets)]

  def _encode(self, text: str) -> tokenizers.Encoding:
    check_text(text)
    encoded = self._tokenizer.encode(text, add_special_tokens=False)
    # A model that is not byte-pair encoding may have the name of a mark among its text pieces.
    if not self._mark_ids.isdisjoint(encoded.ids):
      name = next(name for name, index in self.marks.items() if index in encoded.ids)
      raise TextError(
        f"tokenizer {self.path} cannot spell {name!r} as text, only make it the mark of that name"
      )
    return encoded

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


class TextCollector:
  """Collects the texts that it should encode; takes the place of a tokenizer before training."""

  sha256 = ""
  vocab_size = 0
  bos_id = 1
  eos_id = 2

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.marks = {VISION_START: 3, VISION_END: 4}
    self.texts: list[str] = []

  def encode(self, text: str) -> list[int]:
    check_text(text)
    self.texts.append(text)
    return [0]

  def encode_spans(self, text: str, with_marks: bool) -> list[tuple[int, int, int]]:
    self.encode(text)
    return [(0, 0, len(text))]

  def decode(self, ids: Sequence[int]) -> str:
    raise NotImplementedError


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
  """The tokenizer in a file, chosen by its name.

  Raises:
    UserError: there is no such file, or it is not a tokenizer.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"There is no tokenizer file {path}: name a *.model or a tokenizer.json.")
  kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
  try:
    return kind(path)
  except UserError:
    raise
  except Exception as error:  # Both libraries raise bare Exception or RuntimeError.
    raise UserError(f"{path} is not a tokenizer that can be read: {error}.") from error


def train_sentencepiece(
  texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int
) -> None:
  """Trains a byte-pair model on `texts` and writes it to `path`. Same texts, same file.

  Every text round-trips exactly, except for U+2581, which sentencepiece keeps for the space: there
  is no normalisation, and unseen characters become bytes. Digits are pieces of their own; <vision>
  and </vision> are one piece each; <bos> is 1 and <eos> is 2.

  Raises:
    UserError: there is no text, or it needs more than `vocab_size` pieces, or has fewer.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_lines(texts),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      byte_fallback=True,
      character_coverage=0.9999,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      split_digits=True,
      max_sentence_length=1 << 20,
      user_defined_symbols=[VISION_START, VISION_END],
      bos_piece="<bos>",
      eos_piece="<eos>",
      num_threads=1,
      minloglevel=2,
    )
  except (RuntimeError, OSError) as error:
    raise UserError(
      f"Could not train a tokenizer of {vocab_size} pieces: {_why(str(error))}."
    ) from error
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.write_bytes(model.getvalue())
  unfinished.rename(path)


def _lines(texts: Iterable[str]) -> Iterator[str]:
  """The lines of the texts, in parts that the trainer takes: split before a space if possible."""
  for text in texts:
    for line in text.splitlines():
      for part in line.split(_RESERVED):
        if len(part) > _LONGEST_LINE:
          yield from re.findall(f".{{1,{_LONGEST_LINE}}}(?= )|.{{1,{_LONGEST_LINE}}}", part)
        elif part:
          yield part


def _why(assertion: str) -> str:
  """What the trainer's assertion means."""
  if "sentences_.empty()" in assertion:
    return "there is no text to learn from"
  if match := re.search(r"set it to a value <= (\d+)", assertion):
    return f"this text holds at most {match[1]}, so name no more, or give more text"
  if match := re.search(r"smaller than required_chars. \S+ vs (\d+)", assertion):
    return f"the characters of this text need at least {match[1]}"
  return assertion


def mark_pattern(marks: Iterable[str]) -> re.Pattern[str]:
  """Matches any of the names, the longest that fits; its one group is the name."""
  names = map(re.escape, sorted(marks, key=len, reverse=True))
  return re.compile(f"({'|'.join(names) or '(?!)'})")


def tokenizer_files(path: pathlib.Path) -> dict[str, bytes]:
  """A tokenizer's file and the settings beside it: their contents by name, its own first."""
  files = [path, *(path.with_name(name) for name in SETTINGS_FILES)]
  return {file.name: file.read_bytes() for file in files if file.exists()}


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
  """The ids that end an answer: <eos>, and those that a generation_config.json beside it names."""
  named = read_settings(tokenizer.path, GENERATION_CONFIG).get("eos_token_id")
  ids = named if isinstance(named, list) else [named]
  return frozenset({tokenizer.eos_id, *(index for index in ids if isinstance(index, int))})


def read_settings(path: pathlib.Path, name: str = TOKENIZER_CONFIG) -> dict[str, Any]:
  """A JSON file of settings beside a tokenizer's file; empty if there is none.

  Args:
    path: the tokenizer's file.
    name: of the settings' file; default: tokenizer_config.json.

  Raises:
    UserError: it is not a JSON object.
  """
  path = path.with_name(name)
  if not path.exists():
    return {}
  try:
    settings = json.loads(path.read_text("utf-8-sig"))
  except ValueError as error:
    raise UserError(f"{path} is not JSON: {error}.") from error
  if not isinstance(settings, dict):
    raise UserError(f"{path} holds a JSON {type(settings).__name__}, not an object.")
  return settings


def token_name(setting: Any) -> str | None:
  """The token in a setting of tokenizer_config.json: a string, or an object with its content."""
  return setting.get("content") if isinstance(setting, dict) else setting


def check_text(text: str) -> None:
  """Raises TextError for half of a surrogate pair, which JSON can spell but UTF-8 cannot."""
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise TextError(f"not text that can be encoded: {error.reason}") from error


def file_sha256(path: pathlib.Path) -> str:
  """Hexadecimal SHA-256 of a file's bytes."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
