"""Our tokenizer files as the metadata of a GGUF file; the other direction is gguf_tokenizer.py.

A GGUF file has exactly one token per row of the embedding. Rows that no token of the tokenizer
stands for get names: <|padding_0|>, ... among the text, and <vision_0>, ... for vision codes.
"""

import json
import pathlib
import re
from typing import NamedTuple

import tokenizers
from gguf import TokenType

from lwm.config.model import ModelConfig
from lwm.convert.gguf.settings import Metadata
from lwm.convert.gguf.splits import SPLITS, name_of_split
from lwm.convert.gguf.tokenizer import KEY, ROLES, TEMPLATE_KEY, ModelProto
from lwm.data.chat import template_of
from lwm.data.tokenizer import load_tokenizer, read_settings, token_name
from lwm.data.vision_tokens import VISION_END, VISION_START
from lwm.errors import UserError

# sentencepiece's character for a space.
_SPACE = "\u2581"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
# The score of pieces that no merge makes, below all others.
_LOWEST_SCORE = -1e6


class _Tokens(NamedTuple):
  """Tokens in the order of their ids, with a type each, and the metadata of their kind."""

  tokens: list[str]
  types: list[int]
  metadata: Metadata
  # Per-token scores; empty for byte-level encoding.
  scores: list[float]


def tokenizer_metadata(path: pathlib.Path, config: ModelConfig) -> Metadata:
  """The keys that describe a tokenizer and its chat template.

  Args:
    path: the tokenizer's file, with the files beside it that `load_tokenizer` reads.
    config: of the model; the tokenizer may have fewer tokens than it has text ids.

  Raises:
    UserError: GGUF has no such tokenizer, or it has more tokens than the model has text ids.
  """
  tokenizer = load_tokenizer(path)
  if tokenizer.vocab_size > config.text_vocab_size:
    raise UserError(
      f"{path} has {tokenizer.vocab_size} tokens, but the model has only {config.text_vocab_size} "
      "text ids: name the tokenizer that it was trained with."
    )
  tokens, types, metadata, scores = (
    _from_json(path) if path.suffix == ".json" else _from_sentencepiece(path)
  )
  # No text becomes these, whatever the file calls their type.
  named = [tokenizer.marks[name] for name in (VISION_START, VISION_END) if name in tokenizer.marks]
  for index in (tokenizer.bos_id, tokenizer.eos_id, *named):
    types[index] = int(TokenType.CONTROL)
  padding = config.text_vocab_size - len(tokens)
  tokens += [f"<|padding_{index}|>" for index in range(padding)]
  types += [TokenType.UNUSED] * padding
  tokens += [f"<vision_{code}>" for code in range(config.vision_vocab_size)]
  types += [TokenType.CONTROL] * config.vision_vocab_size
  if scores:
    metadata["scores"] = scores + [_LOWEST_SCORE] * (len(tokens) - len(scores))
  metadata |= {"tokens": tokens, "token_type": types}
  settings = read_settings(path)
  ids = {token: index for index, token in enumerate(tokens)}
  for key, role in ROLES:
    if (name := token_name(settings.get(role))) in ids:
      metadata[key] = ids[name]
  metadata |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
  for key in ("add_bos_token", "add_eos_token"):
    if isinstance(settings.get(key), bool):
      metadata[key] = settings[key]
  keyed = {KEY + key: value for key, value in metadata.items()}
  if template := template_of(path, settings):
    keyed[TEMPLATE_KEY] = template
  return keyed


def _from_sentencepiece(path: pathlib.Path) -> _Tokens:
  model = ModelProto.FromString(path.read_bytes())
  normalizer = model.normalizer_spec
  for wrong, what in (
    (model.trainer_spec.model_type != model.trainer_spec.BPE, "that is not byte-pair encoding"),
    (normalizer.precompiled_charsmap, "that normalises text"),
    (normalizer.remove_extra_whitespaces, "that removes spaces"),
  ):
    if wrong:
      raise UserError(
        f"{path} is a sentencepiece model {what}, which GGUF does not express: export the model to "
        "another format."
      )
  types = [piece.type for piece in model.pieces]
  metadata: Metadata = {
    "model": "llama",
    "pre": "default",
    "add_space_prefix": normalizer.add_dummy_prefix,
    "add_bos_token": True,
    "unknown_token_id": types.index(TokenType.UNKNOWN),
  }
  return _Tokens(
    tokens=[piece.piece for piece in model.pieces],
    types=types,
    metadata=metadata,
    scores=[piece.score for piece in model.pieces],
  )


def _from_json(path: pathlib.Path) -> _Tokens:
  settings = json.loads(path.read_text("utf-8"))
  model, added = settings["model"], settings["added_tokens"]
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  split = name_of_split(tokenizer)
  if model["type"] != "BPE" or (split is None and not model.get("byte_fallback")):
    raise UserError(
      f"{path} is not byte-pair encoding, or splits text in a way that GGUF has no known name for "
      f"({', '.join(SPLITS)}): export the model to another format."
    )
  ids = tokenizer.get_vocab(with_added_tokens=True)
  tokens = [f"<|unused_{index}|>" for index in range(1 + max(ids.values()))]
  types = [int(TokenType.UNUSED)] * len(tokens)
  for token, index in ids.items():
    tokens[index], types[index] = token, TokenType.NORMAL
  for entry in added:
    types[entry["id"]] = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
  merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
  marked, plain = (tokenizer.encode("a", add_special_tokens=flag).tokens for flag in (True, False))
  metadata: Metadata = {"add_bos_token": marked[: -len(plain)] != []}
  if split is not None:
    return _Tokens(tokens, types, metadata | {"model": "gpt2", "pre": split, "merges": merges}, [])
  # A converted sentencepiece model: the earlier a merge, the higher the score of its piece.
  scores = [_LOWEST_SCORE] * len(tokens)
  for rank, merge in reversed(list(enumerate(merges))):
    scores[ids[merge.replace(" ", "")]] = -float(rank)
  for index, token in enumerate(tokens):
    if _BYTE.fullmatch(token):
      types[index] = TokenType.BYTE
  metadata |= {"model": "llama", "pre": "default", "add_space_prefix": plain[0].startswith(_SPACE)}
  if (unknown := model.get("unk_token")) in ids:
    types[ids[unknown]] = TokenType.UNKNOWN
    metadata["unknown_token_id"] = ids[unknown]
  return _Tokens(tokens, types, metadata, scores)
