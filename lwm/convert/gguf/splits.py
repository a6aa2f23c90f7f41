"""How byte-pair tokenizers split a text into words, by GGUF's names for it.

`tokenizer.ggml.pre` names one of the lists of regular expressions in llama.cpp's llama-vocab.cpp.
Here each is the pre-tokenizer of a tokenizer.json that splits the same way.
"""

import json
from typing import Any, NamedTuple

import tokenizers

from lwm.errors import UserError


def _byte_level(use_regex: bool) -> dict[str, Any]:
  return {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": use_regex,
  }


def _by_regexes(*regexes: str) -> dict[str, Any]:
  splits = [
    {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    for regex in regexes
  ]
  return {"type": "Sequence", "pretokenizers": [*splits, _byte_level(use_regex=False)]}


class Split(NamedTuple):
  """One way to split.

  Attributes:
    pre_tokenizer: of a tokenizer.json.
    whole_words: a word that is a token becomes it without any merges.
    adds_bos: whether a text begins with <bos> if the file does not say so.
  """

  pre_tokenizer: dict[str, Any]
  whole_words: bool = False
  adds_bos: bool = False


_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3 and Qwen 2 differ in the number of digits in a word.
_LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The names that we write.
SPLITS = {
  "gpt-2": Split(_byte_level(use_regex=True)),
  "smollm": Split(
    {
      "type": "Sequence",
      "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    }
  ),
  "llama-bpe": Split(_by_regexes(_LLAMA_3 % "{1,3}"), whole_words=True, adds_bos=True),
  "qwen2": Split(_by_regexes(_LLAMA_3 % "")),
  "tekken": Split(_by_regexes(_TEKKEN), whole_words=True, adds_bos=True),
  "default": Split(_by_regexes(r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
# Other names of the same.
_ALIASES = {
  "phi-2": "gpt-2",
  "starcoder": "smollm",
  "refact": "smollm",
  "llama3": "llama-bpe",
  "llama-v3": "llama-bpe",
  "deepseek-r1-qwen": "qwen2",
}
# No two of them split this text alike.
_PROBE = "It's SaID  that\n\n 12345 café, a/b\u0301!!\r\n $5= x^2's 'LL 'T\t\t<|y|>x  \n z  "


def split_named(name: str, place: str) -> Split:
  """The way to split that `tokenizer.ggml.pre` names. `place`, a file, begins the error's message.

  Raises:
    UserError: the name is not known.
  """
  name = _ALIASES.get(name, name)
  if name not in SPLITS:
    raise UserError(
      f"{place}: tokenizer.ggml.pre is {name!r}, which is not supported: convert the model from "
      "its Hugging Face directory."
    )
  return SPLITS[name]


def byte_level_of(split: Split) -> dict[str, Any]:
  """The last step of a pre-tokenizer, which maps bytes to characters; also the decoder."""
  return split.pre_tokenizer.get("pretokenizers", [split.pre_tokenizer])[-1]


def name_of_split(tokenizer: tokenizers.Tokenizer) -> str | None:
  """The name of how a tokenizer.json splits a probe, or None if GGUF has no known name for it."""
  words = _words(tokenizer)
  for name, split in SPLITS.items():
    settings = {"model": {"type": "BPE", "vocab": {}, "merges": []}}
    settings["pre_tokenizer"] = split.pre_tokenizer
    if words == _words(tokenizers.Tokenizer.from_str(json.dumps(settings))):
      return name
  return None


def _words(tokenizer: tokenizers.Tokenizer) -> list[str]:
  pre_tokenizer: Any = tokenizer.pre_tokenizer
  return [word for word, _ in pre_tokenizer.pre_tokenize_str(_PROBE)] if pre_tokenizer else []
