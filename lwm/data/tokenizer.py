"""Text tokenizers from a file: sentencepiece `*.model` and Hugging Face `tokenizer.json`."""

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

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


class Tokenizer(Protocol):
  """What the rest of the library asks of a tokenizer. `encode` adds no <bos> or <eos>."""

  path: pathlib.Path
  # Of the tokenizer's file; prepared datasets and checkpoints name it.
  sha256: str
  vocab_size: int
  bos_id: int
  eos_id: int

  def encode(self, text: str) -> list[int]: ...

  def decode(self, ids: Sequence[int]) -> str: ...


class SentencePieceTokenizer:
  """A sentencepiece model, as Llama 2 and LWM use."""

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.sha256 = file_sha256(self.path)
    self._model = sentencepiece.SentencePieceProcessor(model_proto=self.path.read_bytes())
    self.vocab_size = self._model.get_piece_size()
    self.bos_id = self._model.bos_id()
    self.eos_id = self._model.eos_id()
    if self.bos_id < 0 or self.eos_id < 0:
      raise UserError(f"Tokenizer {path} has no beginning-of-text or no end-of-text piece.")

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    return self._model.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
  """A `tokenizer.json`; `tokenizer_config.json` beside it names <bos> and <eos> if it is there."""

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.sha256 = file_sha256(self.path)
    self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
    # The file keeps what whoever saved it had set.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    # Not the number of its pieces: ids may have gaps.
    self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
    self.bos_id, self.eos_id = self._find_marks()

  def _find_marks(self) -> tuple[int, int]:
    pairs = list(_MARKS)
    config = self.path.with_name("tokenizer_config.json")
    if config.exists():
      settings = json.loads(config.read_text())
      named = [settings.get(name) for name in ("bos_token", "eos_token")]
      pairs.insert(0, tuple(n["content"] if isinstance(n, dict) else n for n in named))
    for pair in pairs:
      ids = tuple(self._tokenizer.token_to_id(mark) for mark in pair if mark)
      if len(ids) == 2 and None not in ids:
        return ids
    raise UserError(
      f"Tokenizer {self.path} has none of the known begin and end marks; put a "
      "tokenizer_config.json that names bos_token and eos_token beside it."
    )

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
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


def train_sentencepiece(texts: Iterable[str], path: str | os.PathLike, vocab_size: int) -> None:
  """Trains a byte-pair model on `texts` and writes it to `path`. Same texts, same file.

  Every text round-trips exactly, but for U+2581, which sentencepiece keeps for the space: there is
  no normalisation, and unseen characters become bytes. Digits are pieces of their own; <vision> and
  </vision> are one piece each; <bos> is 1 and <eos> is 2.

  Raises:
    UserError: the texts hold too little for `vocab_size` pieces, or nothing.
  """
  model = io.BytesIO()
  # Lines, because the trainer leaves out any sentence longer than its limit.
  lines = (line for text in texts for line in text.splitlines() if line)
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=lines,
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
      f"Could not train a tokenizer of {vocab_size} pieces on this text: {error}. "
      "Use another size, or more text."
    ) from error
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.write_bytes(model.getvalue())
  unfinished.rename(path)


def file_sha256(path: pathlib.Path) -> str:
  """Hexadecimal SHA-256 of a file's bytes."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
