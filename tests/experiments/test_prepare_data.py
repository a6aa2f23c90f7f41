import gzip
import json

import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds
import tokenizers
from pyarrow import parquet

from lwm.data import Dataset, load_tokenizer, train_sentencepiece
from lwm.data.documents import text_document
from tests import programs


def _run(*arguments):
  return programs.run("experiments.prepare_data", *arguments)


def test_text_with_a_tokenizer_of_its_own_and_held_out_files(tmp_path):
  for folder, count in (("train", 5), ("validation", 2)):
    (tmp_path / folder).mkdir()
    for i in range(count):
      (tmp_path / folder / f"{i}.py").write_text(f"# the {i}th file of {folder}\n" * 3)
  (tmp_path / "train" / "bad.py").write_bytes(b"\xff")
  command = [
    "--source=text",
    f"--input={tmp_path / 'train'}",
    "--suffix=.py",
    f"--validation_input={tmp_path / 'validation'}",
    f"--tokenizer={tmp_path / 't.model'}",
    f"--output={tmp_path / 'out'}",
  ]
  done = _run(*command, "--train_tokenizer_vocab=280")
  assert done.returncode == 0, done.stderr
  train, validation, last = done.stdout.splitlines()
  dataset = Dataset(tmp_path / "out")
  tokens = dataset.manifest["splits"]["train"]["tokens"]
  entropy = dataset.unigram_entropy("train")["text"]
  assert train == f"train: 5 documents, {tokens} tokens, unigram entropy text {entropy:.3f} nats"
  assert validation.startswith("validation: 2 documents, ")
  assert last.startswith("1 bad records") and last.endswith(f"dataset: {tmp_path / 'out'}")

  again = _run(*command)
  assert again.returncode == 1
  assert again.stderr == (
    f"error: {tmp_path / 'out'} exists already: delete it, or name another --output.\n"
  )


def test_jsonl(tmp_path):
  lines = [json.dumps({"q": f"what is {i}", "a": "a number"}) for i in range(50)]
  (tmp_path / "chat.jsonl").write_text("\n".join(lines))
  done = _run(
    "--source=jsonl",
    f"--input={tmp_path / 'chat.jsonl'}",
    "--fields=[q],a",
    "--fields=[a],q",
    f"--tokenizer={tmp_path / 't.model'}",
    "--train_tokenizer_vocab=290",
    f"--output={tmp_path / 'out'}",
    "--validation_fraction=0.2",
  )
  assert done.returncode == 0, done.stderr
  splits = Dataset(tmp_path / "out").manifest["splits"]
  assert splits["train"]["documents"] + splits["validation"]["documents"] == 50


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "t.model"
  train_sentencepiece(["USER: the quick brown fox ASSISTANT: jumps"], path, 290)
  return load_tokenizer(path)


def _prepare(tmp_path, tokenizer, *flags):
  """The documents that the command makes, as ids and loss masks, and the reasons of its report."""
  output = tmp_path / "out"
  done = _run(f"--tokenizer={tokenizer.path}", f"--output={output}", *flags)
  assert done.returncode == 0, done.stderr
  split = Dataset(output).split("train")
  documents = [split.read(i, 0, int(length)) for i, length in enumerate(split.lengths)]
  lines = (output / "bad_records.jsonl").read_text().splitlines()
  return documents, [json.loads(line)["reason"] for line in lines]


def _ids(documents):
  return [tokens.tolist() for tokens, _ in documents]


RECORDS = [{"text": "the fox", "n": 1}, {"text": " ü <eos> ", "n": 2}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ZSTD = pyarrow.compress(LINES, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
  "files",
  [
    {"a.jsonl.gz": gzip.compress(LINES), "b.JSONL.zst": ZSTD, "c.jsonl": b"\xef\xbb\xbf" + LINES},
    {"a.json": b"\xef\xbb\xbf" + json.dumps(RECORDS).encode(), "b.json.gz": gzip.compress(LINES)},
  ],
)
def test_files_as_they_ship(tmp_path, tokenizer, files):
  (tmp_path / "in").mkdir()
  for name, content in files.items():
    (tmp_path / "in" / name).write_bytes(content)
  documents, bad = _prepare(tmp_path, tokenizer, f"--input={tmp_path / 'in'}", "--fields=text")
  expected = [text_document(tokenizer, record["text"]).tokens.tolist() for record in RECORDS]
  assert _ids(documents) == expected * len(files)
  assert not bad


def test_a_folder_of_packed_texts_with_links(tmp_path, tokenizer):
  for folder in ("in", "elsewhere"):
    (tmp_path / folder).mkdir()
  (tmp_path / "in" / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfthe fox"))
  (tmp_path / "in" / "b.txt").write_text("utf-16", "utf-16")
  (tmp_path / "elsewhere" / "c.txt").write_text("the <vision> fox")
  (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
  documents, bad = _prepare(tmp_path, tokenizer, f"--input={tmp_path / 'in'}")
  assert _ids(documents) == [
    [1, *tokenizer.encode("the fox"), 2],
    [1, *tokenizer.encode("the <vision> fox"), 2],
  ]
  assert bad == ["cannot be read: it looks like UTF-16, so convert it to UTF-8"]


class TokensTfds(tfds.core.GeneratorBasedBuilder):
  """Text that was tokenised elsewhere."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict({"tokens": tfds.features.Sequence(np.int64)})
    return self.dataset_info_from_configs(features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    yield 0, {"tokens": [5, 6]}


@pytest.mark.parametrize("source", ["tfds", "jsonl", "parquet"])
def test_ids_are_taken_where_they_are_asked_for(tmp_path, tokenizer, source):
  if source == "tfds":
    TokensTfds(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    flags = ["--source=tfds", f"--input={tmp_path / 'tokens_tfds' / '1.0.0'}"]
  else:
    flags = [f"--input={tmp_path / 'x'}.{source}"]
    (tmp_path / "x.jsonl").write_text('{"tokens": [5, 6]}')
    parquet.write_table(pyarrow.table({"tokens": [[5, 6]]}), tmp_path / "x.parquet")
  documents, bad = _prepare(tmp_path, tokenizer, *flags, "--ids_field=tokens")
  ((tokens, loss_mask),) = documents
  assert tokens.tolist() == [1, 5, 6, 2] and loss_mask.tolist() == [0, 1, 1, 1] and not bad


def test_a_feature_that_is_no_text_is_refused(tmp_path, tokenizer):
  TokensTfds(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  source = tmp_path / "tokens_tfds" / "1.0.0"
  output = tmp_path / "out"
  flags = ["--source=tfds", f"--input={source}", f"--tokenizer={tokenizer.path}"]
  done = _run(*flags, "--text_feature=tokens", f"--output={output}")
  assert done.returncode == 1 and not output.exists()
  assert done.stderr == (
    "error: No good document in the input, 1 bad ones; the first: "
    f"{source}/train:0: field 'tokens' is list, not text.\n"
  )


def test_columns_that_python_cannot_hold(tmp_path, tokenizer):
  """They cost no row unless the document is made of them."""
  columns = {
    "text": ["the fox", "jumps"],
    "year": pyarrow.array([2**55, 0], pyarrow.timestamp("ms")),
    "day": pyarrow.array([2**30, 0], pyarrow.date32()),
    "zone": pyarrow.array([0, 0], pyarrow.timestamp("s", "Nowhere/Land")),
  }
  path = tmp_path / "x.parquet"
  parquet.write_table(pyarrow.table(columns), path)
  documents, bad = _prepare(tmp_path, tokenizer, f"--input={path}", "--fields=text")
  assert _ids(documents) == [[1, *tokenizer.encode(text), 2] for text in columns["text"]]
  assert not bad
  for field, flags in {"zone": ["--fields=zone"], "year": ["--fields_from=year"]}.items():
    done = _run(
      f"--tokenizer={tokenizer.path}", f"--output={tmp_path / field}", f"--input={path}", *flags
    )
    assert f"the first: {path}:1: field '{field}': cannot be read: " in done.stderr


def test_a_flag_without_effect_on_tfds_is_refused(tmp_path, tokenizer):
  TokensTfds(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  flags = ["--source=tfds", f"--input={tmp_path / 'tokens_tfds' / '1.0.0'}", "--ids_field=tokens"]
  command = [*flags, f"--tokenizer={tokenizer.path}", f"--output={tmp_path / 'out'}"]
  done = _run(*command, "--suffix=.py")
  assert done.stderr == "error: --suffix has no effect on tfds input: leave it out.\n"
  done = _run(*command, "--text_feature=tokens")
  assert done.stderr.startswith("error: Give --ids_field or --text_feature, not both")


def test_chats(tmp_path, tokenizer):
  chat = [{"role": "user", "content": "the fox?"}, {"role": "assistant", "content": "jumps"}]
  path = tmp_path / "x.parquet"
  parquet.write_table(pyarrow.table({"messages": [chat, [None]]}), path)
  documents, bad = _prepare(tmp_path, tokenizer, f"--input={path}", "--chat_field=messages")
  ((tokens, loss_mask),) = documents
  assert tokenizer.decode(tokens) == "USER: the fox? ASSISTANT: jumps"
  assert (tokens[0], tokens[-1]) == (1, 2)
  assert tokenizer.decode(tokens[loss_mask > 0]).strip() == "jumps"
  assert bad == ["message 1 has no role and content, only NoneType"]


def test_a_chat_template_and_marks_in_text_with_a_hugging_face_tokenizer(tmp_path):
  """By hand: what the template writes are marks, what people write is text."""
  words = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
  letters = sorted(set("<|>_endoftxiursma\n"))
  model = tokenizers.models.BPE({word: i for i, word in enumerate(words + letters)}, [])
  bpe = tokenizers.Tokenizer(model)
  bpe.add_special_tokens(words)
  bpe.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "chat_template.jinja").write_text(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  )
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  chat = [
    {"role": "user", "content": "<|im_end|>"},
    {"role": "assistant", "content": "no <|end_of_text|>".replace(" ", "\n")},
  ]
  record = {"messages": chat, "text": "a<|end_of_text|>a"}
  (tmp_path / "x.jsonl").write_text(json.dumps(record))

  def ids(text):
    return [len(words) + letters.index(letter) for letter in text]

  flags = [f"--input={tmp_path / 'x.jsonl'}"]
  (text,), _ = _prepare(tmp_path, tokenizer, *flags, "--fields=text")
  assert text[0].tolist() == [0, *ids("a<|end_of_text|>a"), 1]
  (tmp_path / "chat").mkdir()
  (document,), _ = _prepare(tmp_path / "chat", tokenizer, *flags, "--chat_field=messages")
  user = [2, *ids("user\n<|im_end|>"), 3, *ids("\n")]
  start, answer = [2, *ids("assistant\n")], [*ids("no\n<|end_of_text|>"), 3]
  assert document[0].tolist() == [*user, *start, *answer, *ids("\n")]
  without = [0] * len(user + start)
  assert document[1].tolist() == [*without, *[1] * len(answer), 0]


def test_a_tokenizer_learns_from_what_is_trained_on(tmp_path):
  cyrillic = "быстрая лиса прыгает " * 60_000
  held_out = {"text": "漢字" * 200, "url": ""}
  records = [
    {"text": cyrillic, "url": "xyzzy" * 100, "meta": "plugh" * 100},
    {"text": "half a pair \ud83d" + "qwerty" * 100, "url": ""},
  ]
  (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
  (tmp_path / "v.jsonl").write_text(json.dumps(held_out))
  path = tmp_path / "t.model"
  done = _run(
    f"--input={tmp_path / 'x.jsonl'}",
    f"--validation_input={tmp_path / 'v.jsonl'}",
    "--fields=text",
    f"--tokenizer={path}",
    "--train_tokenizer_vocab=300",
    f"--output={tmp_path / 'out'}",
  )
  assert done.returncode == 0, done.stderr
  tokenizer = load_tokenizer(path)
  pieces = {tokenizer.decode([i]) for i in range(261, 300)}
  assert " лиса" in pieces
  assert not {"x", "g", "w", "漢"} & set("".join(pieces))
  assert "1 bad records" in done.stdout


def test_held_out_files_are_not_trained_on(tmp_path):
  """They are below --input, under their own name or another."""
  root = tmp_path / "in"
  (root / "validation").mkdir(parents=True)
  for i in range(3):
    (root / f"{i}.txt").write_text(f"the {i}th fox jumps\n" * 20)
    (root / "validation" / f"{i}.txt").write_text(f"漢字 {i}")
  (root / "other_name.txt").hardlink_to(root / "validation" / "0.txt")
  tokenizer = tmp_path / "t.model"
  command = [f"--tokenizer={tokenizer}", f"--output={tmp_path / 'out'}"]
  done = _run(
    f"--input={root}",
    f"--validation_input={root / 'validation'}",
    "--train_tokenizer_vocab=280",
    *command,
  )
  assert done.returncode == 0, done.stderr
  splits = Dataset(tmp_path / "out").manifest["splits"]
  assert [splits[name]["documents"] for name in ("train", "validation")] == [3, 3]
  left_out = done.stdout.splitlines()[2].partition("left out: ")[2]
  assert set(left_out.split(", ")) == {
    "held out by --validation_input 3",
    "further links to one file or folder 1",
  }
  pieces = load_tokenizer(tokenizer)
  assert "漢" not in {pieces.decode([i]) for i in range(280)}


def test_an_input_that_is_all_held_out_is_refused(tmp_path, tokenizer):
  path = tmp_path / "x.txt"
  path.write_text("the fox")
  command = [f"--tokenizer={tokenizer.path}", f"--output={tmp_path / 'out'}"]
  done = _run(f"--input={path}", f"--validation_input={tmp_path}", *command)
  assert done.stderr == (
    f"error: --validation_input={tmp_path} holds out every file of --input={path}: name other "
    "files.\n"
  )
  TokensTfds(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  flags = ["--source=tfds", f"--input={tmp_path / 'tokens_tfds' / '1.0.0'}", "--ids_field=tokens"]
  done = _run(*flags, "--validation_input=train", *command)
  assert done.stderr.startswith(
    "error: --validation_input=train and --tfds_split=train have examples in common: "
  )
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--tokenizer=/nothing/t.model"], "no tokenizer file /nothing/t.model"),
    (["--input=/nothing/x.txt"], "There is no input /nothing/x.txt."),
    (["--fields=text"], "--fields is for records with fields; text files have none"),
    (["--chat_field=a", "--ids_field=b"], "Give --chat_field or --ids_field, not both"),
    (["--validation_fraction=2"], "--validation_fraction=2.0 is not in"),
    (["--validation_fraction=0.5", "--validation_input=x"], "not both"),
    (["--suffix=.md"], "--suffix chooses files in a folder, and --input=README.md is a file: "),
    (["--text_feature=x"], "--text_feature has no effect on text input: leave it out."),
    (["--source=jsonl", "--tfds_split=x"], "--tfds_split has no effect on jsonl input: leave it"),
    (["--source=jsonl", "--fields=a,"], "--fields='a,' has an empty entry"),
    (["--source=jsonl", "--fields=a", "--fields_from=b"], "Give --fields or --fields_from, not"),
    (["--output=gs://bucket/out"], "--output=gs://bucket/out is not a directory"),
  ],
)
def test_errors_are_one_sentence(tmp_path, flags, message):
  command = ["--source=text", "--input=README.md", "--tokenizer=x", f"--output={tmp_path / 'out'}"]
  done = _run(*command, *flags)
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.startswith("error: ") and message in done.stderr
  assert done.stderr.count("\n") == 1
