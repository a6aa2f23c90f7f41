import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lwm.data import BadDocument, Dataset, DatasetWriter, prepare, sources, text_document
from lwm.data.documents import record_document
from lwm.data.parts import Vocabulary
from lwm.data.writer import DatasetParts
from lwm.errors import UserError


def _prepare(path, tokenizer, records, to_document=prepare.from_text, fraction=0.0):
  with DatasetWriter(path, tokenizer) as writer:
    prepare.add_documents(writer, records, tokenizer, to_document, prepare.by_fraction(fraction))
  bad = [json.loads(line) for line in (path / "bad_records.jsonl").read_text().splitlines()]
  return Dataset(path), bad


def _documents(dataset, split="train"):
  split = dataset.split(split)
  return [split.read(i, 0, int(split.lengths[i]))[0].tolist() for i in range(len(split))]


def test_text_files(tokenizer, tmp_path):
  root = tmp_path / "books"
  (root / "deeper").mkdir(parents=True)
  (root / "b.txt").write_text("the fox\n")
  (root / "deeper" / "c.txt").write_text("a dog")
  (root / "a.txt").write_bytes(b"caf\xe9")
  (root / "blank.txt").write_text(" \n")
  (root / "other.md").write_text("not this")
  dataset, bad = _prepare(tmp_path / "out", tokenizer, sources.FileSource(root, "text"))
  assert _documents(dataset) == [
    text_document(tokenizer, text).tokens.tolist() for text in ("the fox\n", "a dog")
  ]
  assert bad == [
    {"where": str(root / "a.txt"), "reason": "not UTF-8: byte 0xe9 at 3"},
    {"where": str(root / "blank.txt"), "reason": "the document is empty"},
  ]
  assert dataset.manifest["bad_records"] == 2
  assert dataset.manifest["documents_by_source"] == {"books": 2}


def test_jsonl_with_bad_lines_and_a_bad_file(tokenizer, tmp_path):
  root = tmp_path / "chat"
  root.mkdir()
  good = [{"q": f"fox {i}", "a": f"{i} owls"} for i in range(3)]
  lines = [
    json.dumps(good[0]).encode(),
    b'{"q": "cut off',
    b"",
    b'{"q": "\xff", "a": "x"}',
    b'["a list"]',
    b'{"q": ' + b"1" * 5000 + b"}",
    b'{"q": "no answer"}',
    json.dumps({"q": "", "a": " "}).encode(),
    json.dumps(good[1]).encode(),
  ]
  (root / "1.jsonl").write_bytes(b"\n".join(lines) + b"\n")
  (root / "2.jsonl").write_bytes(bytes(range(256)))
  (root / "3.jsonl").write_text(json.dumps(good[2]))
  to_document = prepare.from_fields(["[q],a"], "fields", seed=0)
  dataset, bad = _prepare(
    tmp_path / "out", tokenizer, sources.FileSource(root, "jsonl"), to_document
  )
  assert _documents(dataset) == [
    record_document(tokenizer, record, "[q],a").tokens.tolist() for record in good
  ]
  file = str(root / "1.jsonl")
  assert [b["where"] for b in bad[:6]] == [f"{file}:{line}" for line in (2, 4, 5, 6, 7, 8)]
  assert [b["reason"].partition(":")[0] for b in bad[:6]] == [
    "not JSON",
    "not UTF-8",
    "a JSON list, not an object",
    "not JSON",
    "there is no field 'a'",
    "the document is empty",
  ]
  assert {b["where"].rpartition(":")[0] for b in bad[6:]} == {str(root / "2.jsonl")}
  assert dataset.manifest["documents_by_source"] == {"1.jsonl": 2, "3.jsonl": 1}


def test_a_record_says_its_own_fields(tokenizer, tmp_path):
  records = [
    {"q": "fox", "a": "owl", "fields": ["[q],a", "[a],q"]},
    {"q": "fox", "a": "owl", "fields": "q"},
    {"q": "fox", "fields": []},
    {"q": "fox"},
  ]
  source = tmp_path / "x.jsonl"
  source.write_text("\n".join(json.dumps(record) for record in [records[0]] * 30 + records[1:]))
  outputs = []
  for run in ("a", "b"):
    to_document = prepare.from_fields([], "fields", seed=3)
    dataset, bad = _prepare(
      tmp_path / run, tokenizer, sources.FileSource(source, "jsonl"), to_document
    )
    outputs.append(_documents(dataset))
    assert [b["where"] for b in bad] == [f"{source}:32", f"{source}:33"]
  assert outputs[0] == outputs[1]
  alternatives = [
    record_document(tokenizer, records[0], fields).tokens.tolist() for fields in ("[q],a", "[a],q")
  ]
  chosen = [alternatives.index(document) for document in outputs[0][:30]]
  assert 5 < sum(chosen) < 25
  assert outputs[0][30] == record_document(tokenizer, records[1], "q").tokens.tolist()


@pytest.mark.parametrize("fields", ["q, text,", "q,,text", "", "[]", "[q+],text"])
def test_fields_with_an_empty_entry(fields):
  with pytest.raises(UserError, match=r"--fields='.*' has an empty entry"):
    prepare.from_fields(["q", fields], "fields", seed=0)


class TinyTfds(tfds.core.GeneratorBasedBuilder):
  """Three texts, one of them blank."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "label": np.int64})
    return self.dataset_info_from_configs(features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for key, text in enumerate(["the fox", " ", "a ü dog"]):
      yield key, {"body": text, "label": key}


def test_tfds_by_name_and_by_directory(tokenizer, tmp_path):
  expected = sorted(text_document(tokenizer, t).tokens.tolist() for t in ("the fox", "a ü dog"))
  to_document = prepare.from_text_field("body")
  records = sources.TfdsSource("tiny_tfds", "train", ["body"], str(tmp_path / "tfds"))
  dataset, bad = _prepare(tmp_path / "by_name", tokenizer, records, to_document)
  assert sorted(_documents(dataset)) == expected
  assert len(bad) == 1 and bad[0]["where"].startswith("tiny_tfds/train:")

  directory = str(tmp_path / "tfds" / "tiny_tfds" / "1.0.0")
  dataset, bad = _prepare(
    tmp_path / "by_directory", tokenizer, sources.TfdsSource(directory, "train"), to_document
  )
  assert sorted(_documents(dataset)) == expected and len(bad) == 1

  # A record that the dataset's own files cannot give is a bad one too.
  (shard,) = (tmp_path / "tfds" / "tiny_tfds" / "1.0.0").glob("*array_record*")
  content = shard.read_bytes()
  shard.write_bytes(content[:100] + bytes(len(content) - 100))
  (*_, last) = sources.TfdsSource(directory, "train")
  assert last.where == f"{directory}/train:2" and last.problem.startswith("cannot be read: ")
  shard.write_bytes(content)

  def overlap(one, two):
    return sources.TfdsSource(directory, one).overlaps(sources.TfdsSource(directory, two))

  assert overlap("train", "train") and overlap("train", "all") and overlap("train[:2]", "train[1:]")
  assert not overlap("train[:1]", "train[1:]") and not overlap("train[2:]", "train[:2]")

  with pytest.raises(UserError, match="no feature 'text', only body, label"):
    sources.TfdsSource(directory, "train", ["text"])
  with pytest.raises(UserError, match="split 'test'"):
    sources.TfdsSource(directory, "test", ["body"])
  with pytest.raises(UserError, match="Could not open TFDS dataset 'nothing_like_it'"):
    sources.TfdsSource("nothing_like_it")


def test_a_source_without_a_good_document_ends_the_run(tokenizer, tmp_path):
  (tmp_path / "in.txt").write_bytes(b"\xff")
  with pytest.raises(UserError, match=r"No good document .* 1 bad .*in.txt: not UTF-8"):
    _prepare(tmp_path / "out", tokenizer, sources.FileSource(tmp_path, "text"))
  assert not (tmp_path / "out").exists()
  (tmp_path / "x.parquet").write_bytes(b"\0" * 100)
  with pytest.raises(UserError, match=r"not a parquet file\.$"):
    _prepare(tmp_path / "out", tokenizer, sources.FileSource(tmp_path, "parquet"))
  with pytest.raises(UserError, match="no file that ends in .jsonl in"):
    _prepare(tmp_path / "out", tokenizer, sources.FileSource(tmp_path, "jsonl"))
  with pytest.raises(UserError, match="no input .*missing"):
    _prepare(tmp_path / "out", tokenizer, sources.FileSource(tmp_path / "missing", "text"))


def test_a_file_name_that_is_not_utf8(tokenizer, tmp_path):
  root = tmp_path / "chat"
  root.mkdir()
  line = json.dumps({"q": "fox", "fields": ["q", "[q],q"]})
  (root / os.fsdecode(b"caf\xe9.jsonl")).write_text(line)
  to_document = prepare.from_fields([], "fields", seed=0)
  dataset, bad = _prepare(
    tmp_path / "out", tokenizer, sources.FileSource(root, "jsonl"), to_document, fraction=1e-9
  )
  assert len(_documents(dataset)) == 1 and not bad


def test_the_split_hangs_on_the_document_alone(tokenizer, tmp_path):
  splits = []
  for root in ("here", "elsewhere"):
    (tmp_path / root).mkdir()
    for i in range(40):
      if root == "here" or i % 2:  # Other files come and go.
        (tmp_path / root / f"{i:02}.txt").write_text(f"text {i}")
    records = list(sources.FileSource(tmp_path / root, "text"))
    split = prepare.by_fraction(0.25)
    splits.append({record.value: split(record) for record in records})
  assert splits[1].items() <= splits[0].items()
  assert 3 < list(splits[0].values()).count("validation") < 20


@pytest.mark.parametrize(
  "value, outcome",
  [
    ([5, 6], [1, 5, 6, 2]),
    ([1, 5, 2], [1, 5, 2]),
    ([1, 5], [1, 5, 2]),
    (np.array([5, 289], np.uint16), [1, 5, 289, 2]),
    ([np.int64(5)], [1, 5, 2]),
    ([2], [1, 2, 2]),
    ([], "the document is empty"),
    (np.array([], np.int32), "the document is empty"),
    ([5, 290], "field 'ids' holds 290, which is no id of the tokenizer: [0, 290)"),
    ([-1, 5], "field 'ids' holds -1, which is no id of the tokenizer: [0, 290)"),
    ([2**70], f"field 'ids' holds {2**70}, which is no id of the tokenizer: [0, 290)"),
    ([1, 2.0], "field 'ids' is a list of float, not of ids"),
    ([1, True], "field 'ids' is a list of bool, not of ids"),
    ([None, "x"], "field 'ids' is a list of NoneType and str, not of ids"),
    ([[5]], "field 'ids' is a list of list, not of ids"),
    (np.array([[5]]), "field 'ids' is a list of lists, not of ids"),
    (np.array([0.5], np.float32), "field 'ids' is a list of float32, not of ids"),
    ("5 6", "field 'ids' is str, not a list of ids"),
    (5, "field 'ids' is int, not a list of ids"),
    (None, "field 'ids' is NoneType, not a list of ids"),
  ],
)
def test_ids(tokenizer, value, outcome):
  record = sources.Record("x:1", "x:1", "x", {"ids": value})
  to_document = prepare.from_ids("ids")
  if isinstance(outcome, str):
    with pytest.raises(BadDocument) as error:
      to_document(tokenizer, record)
    assert str(error.value) == outcome
  else:
    document = to_document(tokenizer, record)
    assert document.tokens.dtype == np.int32 and document.tokens.tolist() == outcome
    assert document.loss_mask.tolist() == [False] + [True] * (len(outcome) - 1)


@pytest.mark.parametrize(
  "value, outcome",
  [
    ("ü", "ü"),
    ("ü".encode(), "ü"),
    (b"\xff", "field 'body' is not UTF-8: byte 0xff at 0"),
    ([np.int32(1)], "field 'body' is list, not text"),
    (np.array([1]), "field 'body' is ndarray, not text"),
    (3, "field 'body' is int, not text"),
  ],
)
def test_only_text_is_text(tokenizer, value, outcome):
  record = sources.Record("x:1", "x:1", "x", {"body": value})
  for to_document in (prepare.from_text_field("body"), prepare.from_fields(["body"], "", 0)):
    if value in ("ü", "ü".encode()):
      assert tokenizer.decode(to_document(tokenizer, record).tokens) == outcome
    else:
      with pytest.raises(BadDocument) as error:
        to_document(tokenizer, record)
      assert str(error.value) == outcome


def test_a_tokenizer_learns_from_the_texts_of_documents_alone(tmp_path):
  values = [
    {"q": "fox", "a": "owl", "url": "x", "vision": [0] * 256},
    {"q": "no answer", "url": "y"},
    {"q": "half \ud83d", "a": "z", "vision": [0] * 256},
  ]
  records = [sources.Record(f"x:{i}", f"x:{i}", "x", value) for i, value in enumerate(values)]
  records.append(sources.Record("x:3", "x:3", "x", None, "not JSON"))

  def learned(to_document):
    return list(prepare.training_texts(records, to_document, tmp_path / "t.model"))

  assert learned(prepare.from_fields(["[q],a+vision"], "", 0)) == ["fox", "owl"]
  assert learned(prepare.from_text_field("q")) == ["fox", "no answer"]
  assert learned(prepare.from_ids("vision")) == []


def test_parts_give_the_same_bytes_whoever_makes_them(tokenizer, tmp_path):
  lines = [json.dumps({"text": f"fox {i}"}) for i in range(25)]
  lines[9] = "no record"
  (tmp_path / "in.jsonl").write_text("\n".join(lines))
  source = sources.FileSource(tmp_path / "in.jsonl")
  made = []

  def parts(name):
    return DatasetParts(tmp_path / name, Vocabulary(tokenizer), {"input": source.identity()})

  def make(name, is_mine=lambda number: True, fail_at=None):
    def to_document(tokenizer, record):
      if record.where.endswith(f":{fail_at}"):
        raise KeyboardInterrupt
      made.append(record.where)
      return prepare.from_text_field("text")(tokenizer, record)

    def add(writer, records, split):
      prepare.add_documents(writer, records, tokenizer, to_document, split)

    return prepare.add_parts(parts(name), [(source, prepare.by_fraction(0.2))], add, 4, is_mine)

  def join(name):
    parts(name).join(7)
    return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

  assert make("whole") == 7
  whole = join("whole")
  assert Dataset(tmp_path / "whole").manifest["bad_records"] == 1

  for start in (1, 0):
    make("shared", lambda number: number % 2 == start)
  assert join("shared") == whole

  with pytest.raises(KeyboardInterrupt):
    make("killed", fail_at=15)
  made.clear()
  make("killed")
  # The parts before the one that was being made are not made again.
  assert made[0].endswith(":13")
  assert join("killed") == whole
