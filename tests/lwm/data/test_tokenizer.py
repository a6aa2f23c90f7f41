import pytest
import tokenizers

from lwm.data import load_tokenizer, train_sentencepiece
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
  with pytest.raises(UserError, match="tokenizer of 5000 pieces"):
    train_sentencepiece(["too little"], tmp_path / "t.model", 5000)
  with pytest.raises(UserError, match="Could not train"):
    train_sentencepiece([], tmp_path / "t.model", 300)
  assert not (tmp_path / "t.model").exists()
