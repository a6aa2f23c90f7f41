"""Tokenizers to GGUF and back. What llama.cpp makes of a text was recorded with xllamacpp."""

import json

import pytest
import sentencepiece
import tokenizers
from gguf import TokenType

from lwm.config.model import ModelConfig
from lwm.convert.gguf.splits import SPLITS, name_of_split
from lwm.convert.gguf.tokenizer import read_tokenizer
from lwm.convert.gguf.vocabulary import tokenizer_metadata
from lwm.data import load_tokenizer
from lwm.data.chat import ChatFormat
from lwm.data.tokenizer import train_sentencepiece
from lwm.errors import UserError

TEXT = (
  "It's  the café,\n\n 12345 caf\u00e9 \t a/b <|im_start|><vision> \u4f60\u597d \U0001f600 THE'LL  "
)
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"


def restored(metadata, config, folder):
  """The tokenizer that a file with this metadata holds."""
  files = read_tokenizer(folder / "model.gguf", metadata, config.vocab_size, config.text_vocab_size)
  folder.mkdir()
  for name, content in files.items():
    (folder / name).write_bytes(content)
  return load_tokenizer(folder / next(iter(files)))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
  train_sentencepiece(["the cat sat on the mat, the end", "It's the caf\u00e9"], path, 300)
  return path


def byte_pairs() -> dict:
  """A tokenizer.json of 256 bytes, a few merges, and two marks."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("1", "2"), ("12", "3"), ("'", "s")]
  tokens = [*alphabet, *("".join(pair) for pair in merges), "<|im_start|>", "<|im_end|>", "<tool>"]
  vocab = {token: index for index, token in enumerate(tokens)}
  added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  byte_level = SPLITS["gpt-2"].pre_tokenizer
  return {
    "version": "1.0",
    "added_tokens": [
      added | {"content": token, "id": vocab[token], "special": token != "<tool>"}
      for token in tokens[-3:]
    ],
    "pre_tokenizer": byte_level,
    "decoder": byte_level,
    "model": {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges]},
  }


@pytest.fixture
def json_file(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(byte_pairs()))
  settings = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
  settings |= {"pad_token": "<|im_end|>", "chat_template": TEMPLATE}
  path.with_name("tokenizer_config.json").write_text(json.dumps(settings))
  return path


def test_sentencepiece_models_return(model_file, tmp_path):
  config = ModelConfig(text_vocab_size=303, vision_vocab_size=5)
  metadata = tokenizer_metadata(model_file, config)
  ours, back = load_tokenizer(model_file), restored(metadata, config, tmp_path / "back")
  assert back.vocab_size == ours.vocab_size == 300
  assert (back.bos_id, back.eos_id, back.marks) == (ours.bos_id, ours.eos_id, ours.marks)
  assert back.encode(TEXT) == ours.encode(TEXT)
  assert back.decode(back.encode(TEXT)) == TEXT
  pieces = [
    sentencepiece.SentencePieceProcessor(model_file=str(t.path)).get_score(id=290)
    for t in (ours, back)
  ]
  assert pieces[0] == pieces[1] < 0


def test_every_row_has_a_token(model_file):
  metadata = tokenizer_metadata(
    model_file, ModelConfig(text_vocab_size=303, vision_vocab_size=5, vocab_multiple=16)
  )
  tokens, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
  assert len(tokens) == len(types) == len(metadata["tokenizer.ggml.scores"]) == 308
  assert tokens[299:] == [
    tokens[299],
    *(f"<|padding_{index}|>" for index in range(3)),
    *(f"<vision_{code}>" for code in range(5)),
  ]
  assert types[300:] == [TokenType.UNUSED] * 3 + [TokenType.CONTROL] * 5
  # Text never becomes these, although the model's own file calls them user-defined.
  assert [types[tokens.index(name)] for name in ("<vision>", "</vision>")] == [3, 3]
  assert types[tokens.index("<0x0A>")] == TokenType.BYTE
  assert metadata["tokenizer.ggml.add_space_prefix"] is False
  assert metadata["tokenizer.ggml.add_bos_token"] is True


def test_byte_pairs_return(json_file, tmp_path):
  config = ModelConfig(text_vocab_size=266)
  metadata = tokenizer_metadata(json_file, config)
  assert metadata["tokenizer.ggml.pre"] == "gpt-2"
  assert metadata["tokenizer.ggml.merges"][1] == "th e"
  assert metadata["tokenizer.ggml.padding_token_id"] == 263
  assert metadata["tokenizer.ggml.add_bos_token"] is False
  ours, back = load_tokenizer(json_file), restored(metadata, config, tmp_path / "back")
  assert (back.bos_id, back.eos_id, back.marks) == (ours.bos_id, ours.eos_id, ours.marks)
  assert back.vocab_size == ours.vocab_size == 265
  assert back.encode(TEXT + "<tool>") == ours.encode(TEXT + "<tool>")
  assert back.encode("<tool>") == [264]
  assert back.decode(back.encode(TEXT)) == TEXT
  messages = [{"role": "user", "content": "the <tool>"}]
  assert ChatFormat(back).prompt(messages) == ChatFormat(ours).prompt(messages)


def test_marks_of_both_kinds_survive_gaps(json_file):
  content = byte_pairs()
  content["model"]["vocab"]["<tool>"] = 270
  content["added_tokens"][-1]["id"] = 270
  json_file.write_text(json.dumps(content))
  metadata = tokenizer_metadata(json_file, ModelConfig(text_vocab_size=271))
  assert metadata["tokenizer.ggml.tokens"][262:] == [
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|unused_{index}|>" for index in range(264, 270)),
    "<tool>",
  ]
  assert metadata["tokenizer.ggml.token_type"][262:] == [3, 3, *[5] * 6, 4]


# How llama.cpp splits "It's 12345\n\n a/b  THE'LL" into words.
WORDS = {
  "gpt-2": ["It", "'s", " 12345", "\n\n", " a", "/", "b", " ", " THE", "'", "LL"],
  "smollm": ["It", "'s", " ", "1", "2", "3", "4", "5", "\n\n", " a", "/", "b", " ", " THE"]
  + ["'", "LL"],
  "llama-bpe": ["It", "'s", " ", "123", "45", "\n\n", " a", "/b", " ", " THE", "'LL"],
  "qwen2": ["It", "'s", " ", "1", "2", "3", "4", "5", "\n\n", " a", "/b", " ", " THE", "'LL"],
  "tekken": ["It", "'s", " ", "1", "2", "3", "4", "5", "\n\n", " a", "/b", " ", " THE", "'LL"],
  "default": ["It", "'", "s", " ", "123", "45", "\n\n", " a", "/", "b", " ", " THE", "'", "LL"],
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits_are_those_of_llama_cpp(name):
  content = byte_pairs() | {"pre_tokenizer": SPLITS[name].pre_tokenizer}
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
  words = tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345\n\n a/b  THE'LL")
  spelled = [word.replace("\u0120", " ").replace("\u010a", "\n") for word, _ in words]
  assert spelled == WORDS[name]
  assert name_of_split(tokenizer) == name


def test_texts_begin_with_bos_where_the_split_says_so(json_file, tmp_path):
  config = ModelConfig(text_vocab_size=265)
  metadata = tokenizer_metadata(json_file, config)
  metadata["tokenizer.ggml.pre"] = "llama-bpe"
  del metadata["tokenizer.ggml.add_bos_token"]
  back = restored(metadata, config, tmp_path / "back")
  file = tokenizers.Tokenizer.from_file(str(back.path))
  assert file.encode("the").ids == [back.bos_id, *back.encode("the")]
  assert tokenizer_metadata(back.path, config)["tokenizer.ggml.add_bos_token"] is True


def test_converted_sentencepiece_models_get_scores(tmp_path):
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("a", "t"), ("\u2581", "c"), ("c", "at")]
  merges += [("\u2581c", "at"), ("\u2581", "t")]
  pieces += [*"\u2581theac", *("".join(merge) for merge in merges)]
  added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  content = {
    "version": "1.0",
    "added_tokens": [
      added | {"content": piece, "id": index, "special": True}
      for index, piece in enumerate(pieces[:3])
    ],
    "normalizer": {
      "type": "Sequence",
      "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
      ],
    },
    "model": {
      "type": "BPE",
      "unk_token": "<unk>",
      "fuse_unk": True,
      "byte_fallback": True,
      "vocab": {piece: index for index, piece in enumerate(pieces)},
      "merges": [list(merge) for merge in merges],
    },
  }
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(content))
  config = ModelConfig(text_vocab_size=len(pieces))
  metadata = tokenizer_metadata(path, config)
  assert metadata["tokenizer.ggml.model"] == "llama"
  assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
  assert metadata["tokenizer.ggml.unknown_token_id"] == 0
  back = restored(metadata, config, tmp_path / "back")
  assert back.path.name == "tokenizer.model"
  for text in ("the cat that the", "a cat", " at  the chat \u00e9"):
    assert back.encode(text) == load_tokenizer(path).encode(text)


def edited(metadata, **changes):
  metadata = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
  return {key: value for key, value in metadata.items() if value is not None}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model": "bert"}, "tokenizer.ggml.model is 'bert', which is not supported"),
    ({"pre": "viking"}, "tokenizer.ggml.pre is 'viking', which is not supported"),
    ({"tokens": None}, "tokenizer.ggml.tokens has no entries for the 265 rows"),
    ({"token_type": [1] * 264}, "tokenizer.ggml.token_type has 264 entries for the 265 rows"),
    ({"merges": None}, "lacks the key tokenizer.ggml.merges"),
    ({"merges": ["th q"]}, "tokenizer.ggml.tokens and the keys beside it make no tokenizer"),
    ({"tokens": [1] * 265}, "tokenizer.ggml.tokens is no list of str"),
    ({"token_type": [99] * 265}, "tokenizer.ggml.token_type has the unknown type 99"),
    ({"scores": [0.0] * 3}, "tokenizer.ggml.scores has 3 entries for the 265 rows"),
    ({"scores": ["0"] * 265}, "tokenizer.ggml.scores is no list of float"),
    ({"bos_token_id": True}, "tokenizer.ggml.bos_token_id is True, not one of the tokens"),
    ({"bos_token_id": 265}, "tokenizer.ggml.bos_token_id is 265, not one of the tokens"),
    ({"bos_token_id": None, "add_bos_token": True}, "lacks the key tokenizer.ggml.bos_token_id"),
    ({"model": "llama", "tokens": ["x"] * 265}, "the keys beside it make no tokenizer"),
  ],
)
def test_wrong_metadata(json_file, changes, message):
  metadata = edited(tokenizer_metadata(json_file, ModelConfig(text_vocab_size=265)), **changes)
  with pytest.raises(UserError, match=f"some.gguf.*{message}"):
    read_tokenizer(json_file.with_name("some.gguf"), metadata, 265, 265)


def test_tokenizers_that_gguf_does_not_know(json_file, model_file, tmp_path):
  with pytest.raises(UserError, match="has 265 tokens, but the model has only 200 text ids"):
    tokenizer_metadata(json_file, ModelConfig(text_vocab_size=200))
  content = byte_pairs()
  content["pre_tokenizer"] = {"type": "Whitespace"}
  json_file.write_text(json.dumps(content))
  with pytest.raises(UserError, match="tokenizer.json is not byte-pair encoding, or splits"):
    tokenizer_metadata(json_file, ModelConfig(text_vocab_size=265))
  unigram = tmp_path / "unigram.model"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the cat sat", "on the mat"]),
    model_prefix=str(unigram.with_suffix("")),
    vocab_size=20,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  with pytest.raises(
    UserError, match="unigram.model is a sentencepiece model that is not byte-pair"
  ):
    tokenizer_metadata(unigram, ModelConfig(text_vocab_size=20))
