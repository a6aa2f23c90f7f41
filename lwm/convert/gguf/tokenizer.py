"""The tokenizer in a GGUF file, as the files that lwm/data reads.

`tokenizer.ggml.model` is "llama" for a sentencepiece model, and "gpt2" for byte-level byte-pair
encoding, which becomes a tokenizer.json.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
from gguf import TokenType
from sentencepiece import sentencepiece_model_pb2

from lwm.convert.gguf.splits import Split, byte_level_of, split_named
from lwm.data.tokenizer import CHAT_TEMPLATE, TOKENIZER_CONFIG
from lwm.errors import UserError

# A message class that its module builds when it is imported.
ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
KEY = "tokenizer.ggml."
TEMPLATE_KEY = "tokenizer.chat_template"
# Tokens with a role: (key without KEY, name in tokenizer_config.json).
ROLES = (
  ("bos_token_id", "bos_token"),
  ("eos_token_id", "eos_token"),
  ("unknown_token_id", "unk_token"),
  ("padding_token_id", "pad_token"),
)
# Score of tokens in a file without scores.
_NO_SCORE = 0.0


class _Vocabulary(NamedTuple):
  """What the keys of a file say."""

  path: pathlib.Path
  metadata: Mapping[str, Any]
  tokens: list[str]
  types: list[int]
  scores: list[float]
  # Tokens by their role, as ROLES names it.
  roles: dict[str, str]

  def flag(self, key: str, default: bool) -> bool:
    return bool(self.metadata.get(KEY + key, default))


def read_tokenizer(
  path: pathlib.Path, metadata: Mapping[str, Any], num_rows: int, num_text: int
) -> dict[str, bytes]:
  """The tokenizer of a GGUF file.

  Args:
    path: the file; messages name it.
    metadata: of the file.
    num_rows: of the embedding: the number of tokens.
    num_text: the number of them that are text. Those after it, and unused ones at the end, are left
      out.

  Returns:
    Contents by name, the tokenizer's own file first, as `lwm.data.tokenizer.tokenizer_files`.

  Raises:
    UserError: keys are missing or contradict each other, or this kind of tokenizer is unknown.
  """
  vocabulary = _read_vocabulary(path, metadata, num_rows, num_text)
  kind = metadata.get(KEY + "model")
  if kind == "llama":
    adds_bos = vocabulary.flag("add_bos_token", True)
    files = {"tokenizer.model": _sentencepiece_model(vocabulary)}
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer"}
  elif kind == "gpt2":
    split = split_named(metadata.get(KEY + "pre", "default"), str(path))
    adds_bos = vocabulary.flag("add_bos_token", split.adds_bos)
    files = {"tokenizer.json": _tokenizer_json(vocabulary, split, adds_bos)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
  else:
    raise UserError(
      f"{path}: tokenizer.ggml.model is {kind!r}, which is not supported: convert a model with "
      "'llama' or 'gpt2'."
    )
  settings |= vocabulary.roles
  settings |= {
    "add_bos_token": adds_bos,
    "add_eos_token": vocabulary.flag("add_eos_token", False),
    "clean_up_tokenization_spaces": False,
  }
  files[TOKENIZER_CONFIG] = (json.dumps(settings, indent=2) + "\n").encode()
  if template := metadata.get(TEMPLATE_KEY):
    files[CHAT_TEMPLATE] = str(template).encode()
  return files


def _read_vocabulary(
  path: pathlib.Path, metadata: Mapping[str, Any], num_rows: int, num_text: int
) -> _Vocabulary:
  tokens = metadata.get(KEY + "tokens")
  types = metadata.get(KEY + "token_type")
  scores = metadata.get(KEY + "scores", [_NO_SCORE] * num_rows)
  for key, values, kind in (
    ("tokens", tokens, str),
    ("token_type", types, int),
    ("scores", scores, float),
  ):
    if not isinstance(values, list) or len(values) != num_rows:
      count = len(values) if isinstance(values, list) else "no"
      raise UserError(
        f"{path}: {KEY}{key} has {count} entries for the {num_rows} rows of the embedding: get a "
        "complete file."
      )
    # All entries of a list have the same type.
    if not isinstance(values[0], kind) or isinstance(values[0], bool):
      raise UserError(f"{path}: {KEY}{key} is no list of {kind.__name__}: get the file again.")
  assert isinstance(tokens, list) and isinstance(types, list)
  if unknown := sorted(set(types) - set(TokenType)):
    raise UserError(
      f"{path}: {KEY}token_type has the unknown type {unknown[0]}: get the file again."
    )
  while num_text and types[num_text - 1] == TokenType.UNUSED:
    num_text -= 1
  roles = {}
  for key, role in ROLES:
    index = metadata.get(KEY + key)
    if index is None:
      continue
    if type(index) is not int or not 0 <= index < num_text:
      raise UserError(f"{path}: {KEY}{key} is {index}, not one of the tokens: get the file again.")
    roles[role] = tokens[index]
  return _Vocabulary(path, metadata, tokens[:num_text], types[:num_text], scores[:num_text], roles)


def _sentencepiece_model(vocabulary: _Vocabulary) -> bytes:
  """A sentencepiece model with the pieces, scores and types of the file."""
  model = ModelProto()
  marks = {vocabulary.roles.get(role) for role in ("bos_token", "eos_token", "pad_token")}
  unknown = vocabulary.roles.get("unk_token", "<unk>")
  # Both formats number the types alike.
  for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types):
    if token == unknown:
      kind = TokenType.UNKNOWN
    elif token in marks:
      kind = TokenType.CONTROL
    model.pieces.add(piece=token, score=score, type=kind)
  trainer = model.trainer_spec
  trainer.model_type = trainer.BPE
  trainer.vocab_size = len(vocabulary.tokens)
  trainer.byte_fallback = TokenType.BYTE in vocabulary.types
  trainer.unk_piece = unknown
  trainer.bos_piece = vocabulary.roles.get("bos_token", "<s>")
  trainer.eos_piece = vocabulary.roles.get("eos_token", "</s>")
  for role, field in (("bos", "bos_id"), ("eos", "eos_id"), ("unknown", "unk_id")):
    setattr(trainer, field, vocabulary.metadata.get(f"{KEY}{role}_token_id", -1))
  normalizer = model.normalizer_spec
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = vocabulary.flag("add_space_prefix", True)
  normalizer.remove_extra_whitespaces = vocabulary.flag("remove_extra_whitespaces", False)
  normalizer.escape_whitespaces = True
  content = model.SerializeToString()
  try:
    sentencepiece.SentencePieceProcessor(model_proto=content)
  except Exception as error:  # The library raises RuntimeError and others.
    raise _unreadable(vocabulary, error) from error
  return content


def _tokenizer_json(vocabulary: _Vocabulary, split: Split, adds_bos: bool) -> bytes:
  """A tokenizer.json with the tokens and merges of the file."""
  merges = vocabulary.metadata.get(KEY + "merges")
  if not isinstance(merges, list):
    raise UserError(f"{vocabulary.path} lacks the key {KEY}merges: get a complete file.")
  byte_level = byte_level_of(split)
  settings = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      {
        "id": index,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": kind == TokenType.CONTROL,
      }
      for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types))
      if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ],
    "normalizer": None,
    "pre_tokenizer": split.pre_tokenizer,
    "post_processor": _with_bos(vocabulary) if adds_bos else byte_level,
    "decoder": byte_level,
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": split.whole_words,
      "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
      "merges": merges,
    },
  }
  content = json.dumps(settings, ensure_ascii=False)
  try:
    tokenizers.Tokenizer.from_str(content)
  except Exception as error:  # The library raises Exception.
    raise _unreadable(vocabulary, error) from error
  return content.encode()


def _with_bos(vocabulary: _Vocabulary) -> dict[str, Any]:
  """The post-processor that begins every text with <bos>."""
  bos = vocabulary.roles.get("bos_token")
  if bos is None:
    raise UserError(
      f"{vocabulary.path} lacks the key {KEY}bos_token_id, but texts begin with <bos>: get a "
      "complete file."
    )
  mark = {"SpecialToken": {"id": bos, "type_id": 0}}
  first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
  return {
    "type": "TemplateProcessing",
    "single": [mark, first],
    "pair": [mark, first, mark, second],
    "special_tokens": {bos: {"id": bos, "ids": [vocabulary.tokens.index(bos)], "tokens": [bos]}},
  }


def _unreadable(vocabulary: _Vocabulary, error: Exception) -> UserError:
  reason = str(error).strip().splitlines()[-1]
  return UserError(
    f"{vocabulary.path}: {KEY}tokens and the keys beside it make no tokenizer ({reason}): get the "
    "file again."
  )
