import pytest
import tokenizers

from lwm.data import load_tokenizer, train_sentencepiece
from lwm.data.tokenizer import TextError, end_ids
from lwm.errors import UserError


@pytest.mark.parametrize(
  "text",
  ["", " ", "a\n\n  b\t\r\n", "  leading and trailing  ", "ü 漢字 🦉 \x00", "12345", "<bos>"],
)
def test_a_trained_tokenizer_gives_every_text_back(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_marks_of_a_trained_tokenizer(tokenizer):
  assert tokenizer.vocab_size == 290
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
  assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("fox"), tokenizer.eos_id]) == "fox"
  assert tokenizer.marks == {"<bos>": 1, "<eos>": 2, "<vision>": 3, "</vision>": 4}
  # No text can put a document's marks into its middle.
  text = "<bos> <eos> a<vision></vision>b <unk>"
  assert min(tokenizer.encode(text)) > 4 and tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic(tmp_path):
  for name in ("a.model", "b.model"):
    train_sentencepiece(["some text to learn from", "and 12 more"], tmp_path / name, 280)
  hashes = {load_tokenizer(tmp_path / name).sha256 for name in ("a.model", "b.model")}
  assert len(hashes) == 1
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_long_lines_and_reserved_characters_are_learned_from(tmp_path):
  """The trainer leaves out lines of more than a mebibyte, and all with U+2585."""
  words = "быстрая лиса прыгает "
  for name, text in {
    "spaces": words * 60_000,
    "no_spaces": words.replace(" ", "") * 60_000,
    "reserved": f"{words * 9}\u2585",
  }.items():
    path = tmp_path / f"{name}.model"
    train_sentencepiece([text], path, 300)
    tokenizer = load_tokenizer(path)
    assert len(tokenizer.encode("быстрая")) < 7
    assert tokenizer.decode(tokenizer.encode("a\u2585b")) == "a\u2585b"
  # Where the words stay whole, a text of one long line teaches what its lines teach.
  train_sentencepiece([words * 100] * 600, tmp_path / "lines.model", 300)
  pieces = {
    name: [load_tokenizer(tmp_path / f"{name}.model").decode([i]) for i in range(300)]
    for name in ("lines", "spaces")
  }
  assert pieces["lines"] == pieces["spaces"]


@pytest.mark.parametrize("config", ["", '{"bos_token": {"content": "<x>"}, "eos_token": "</s>"}'])
def test_hugging_face_tokenizer(tmp_path, config):
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<s>", "</s>", "<x>"],
    initial_alphabet=alphabet,
    show_progress=False,
  )
  bpe.train_from_iterator(["the quick brown fox"], trainer)
  path = tmp_path / "tokenizer.json"
  bpe.save(str(path))
  if config:
    (tmp_path / "tokenizer_config.json").write_text(config)

  tokenizer = load_tokenizer(path)
  assert tokenizer.bos_id == bpe.token_to_id("<x>" if config else "<s>")
  assert tokenizer.eos_id == bpe.token_to_id("</s>")
  assert tokenizer.vocab_size == bpe.get_vocab_size()
  text = " the fox\nü "
  assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode(text)]) == text


def test_marks_in_a_text_are_text(tmp_path):
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
  bpe.train_from_iterator(["the quick brown fox"], trainer)
  special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
  bpe.add_special_tokens(special)
  # Without these flags: a symbol of our own, and one that is part of the text.
  bpe.add_tokens(["<vision>", "</vision>", "<code>"])
  bpe.save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")

  marks = [*special, "<vision>", "</vision>"]
  assert tokenizer.marks == {mark: bpe.token_to_id(mark) for mark in marks}
  text = " a ".join(marks) + "b"
  ids = tokenizer.encode(text)
  assert not set(ids) & set(tokenizer.marks.values())
  assert tokenizer.decode(ids) == text
  plain = "the <code> fox\n ü"
  assert tokenizer.encode(plain) == bpe.encode(plain).ids
  assert bpe.token_to_id("<code>") in tokenizer.encode(plain)
  assert tokenizer.vocab_size == bpe.get_vocab_size()


def test_a_mark_that_a_model_spells_is_refused(tmp_path):
  pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("a", -1.0)]
  unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
  unigram.add_special_tokens(["<unk>", "<s>", "</s>"])
  unigram.save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  assert tokenizer.encode("aüa") == [3, 0, 3]
  with pytest.raises(TextError, match="cannot spell '</s>' as text"):
    tokenizer.encode("a</s>a")


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging_face"])
def test_half_a_surrogate_pair_is_a_sentence(tokenizer, tmp_path, kind):
  if kind == "hugging_face":
    model = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  for encode in (tokenizer.encode, lambda text: tokenizer.encode_spans(text, with_marks=True)):
    with pytest.raises(TextError, match="not text that can be encoded"):
      encode("a\ud83d")


def test_spans_cover_the_text(tokenizer):
  text = "ü🦉 the<eos> fox <vision>\n"
  spans = tokenizer.encode_spans(text, with_marks=False)
  assert [index for index, _, _ in spans] == tokenizer.encode(text)
  assert "".join(text[start:stop] for _, start, stop in spans) == text
  marked = tokenizer.encode_spans(text, with_marks=True)
  assert {text[start:stop] for index, start, stop in marked if index < 5} == {"<eos>", "<vision>"}
  assert "".join(text[start:stop] for _, start, stop in marked) == text


def test_no_text_is_cut_or_padded(tmp_path):
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>")
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  # What a program set before it saved the tokenizer.
  words.enable_truncation(4)
  words.enable_padding(length=4)
  words.save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  assert tokenizer.encode("a a") == [2, 2]
  assert tokenizer.encode("a a a a a a") == [2] * 6


def test_ids_may_have_gaps(tmp_path):
  vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 7}
  model = tokenizers.models.WordLevel(vocabulary, unk_token="<s>")
  tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  # Ids from here on are those of vision.
  assert tokenizer.encode("b") == [7] and tokenizer.vocab_size == 8


def test_errors_name_the_file(tmp_path):
  with pytest.raises(UserError, match="no tokenizer file .*none.model"):
    load_tokenizer(tmp_path / "none.model")
  for name in ("wrong.model", "wrong.json"):
    (tmp_path / name).write_text("no tokenizer")
    with pytest.raises(UserError, match=f"{name} is not a tokenizer"):
      load_tokenizer(tmp_path / name)
  for texts, size, message in [
    (["too little"], 5000, "tokenizer of 5000 pieces: this text holds at most [0-9]+, so name no"),
    ([chr(0x4E00 + i) for i in range(400)], 300, "the characters of this text need at least 661$"),
    ([], 300, "there is no text to learn from$"),
    (["\n", ""], 300, "there is no text to learn from$"),
  ]:
    with pytest.raises(UserError, match=message.replace("$", r"\.$")):
      train_sentencepiece(texts, tmp_path / "t.model", size)
  assert not (tmp_path / "t.model").exists()


def test_what_ends_an_answer(tmp_path):
  """Chats of some models end with a mark that is not their <eos>."""
  train_sentencepiece(["some text to learn from", "and 12 more"], tmp_path / "a.model", 280)
  tokenizer = load_tokenizer(tmp_path / "a.model")
  assert end_ids(tokenizer) == {tokenizer.eos_id}
  settings = tmp_path / "generation_config.json"
  settings.write_text('{"eos_token_id": [7, 9]}')
  assert end_ids(tokenizer) == {tokenizer.eos_id, 7, 9}
  settings.write_text('{"eos_token_id": 5}')
  assert end_ids(tokenizer) == {tokenizer.eos_id, 5}
