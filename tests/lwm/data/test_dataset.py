import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lwm.config.vqgan import LWM_LAYOUT, VisionLayout
from lwm.data import (
  BadDocument,
  Dataset,
  DatasetWriter,
  Document,
  load_tokenizer,
  text_document,
  train_sentencepiece,
)
from lwm.data.parts import entropy
from lwm.errors import UserError


def test_documents_come_back(datasets, documents, tokenizer):
  for name, path in datasets.items():
    dataset = Dataset(path)
    split = dataset.split("train")
    assert len(split) == len(documents[name])
    for index, document in enumerate(documents[name]):
      tokens, loss_mask = split.read(index, 0, len(document.tokens))
      np.testing.assert_array_equal(tokens, document.tokens)
      np.testing.assert_array_equal(loss_mask, document.loss_mask)
    assert dataset.text_vocab_size == tokenizer.vocab_size
  assert Dataset(datasets["video"]).has_vision and not Dataset(datasets["text"]).has_vision


def test_a_manifest_without_a_layout_means_that_of_lwm(datasets, tmp_path):
  assert Dataset(datasets["text"]).vision_layout is None
  assert Dataset(datasets["video"]).vision_layout == LWM_LAYOUT
  path = shutil.copytree(datasets["video"], tmp_path / "video")
  manifest = json.loads((path / "manifest.json").read_text())
  recorded = {"codes_per_frame": 256, "end_of_frame": 8192}
  assert manifest.pop("vision_layout") == recorded
  (path / "manifest.json").write_text(json.dumps(manifest))
  assert Dataset(path).vision_layout == LWM_LAYOUT
  manifest["vision_layout"] = recorded | {"codes_per_frame": 64}
  (path / "manifest.json").write_text(json.dumps(manifest))
  assert Dataset(path).vision_layout == VisionLayout(64, 8192)


def test_a_slice_reads_only_the_records_that_it_meets(datasets, documents):
  split = Dataset(datasets["video"]).split("train")  # Records of 50 tokens.
  read = []

  class Counting:
    def __init__(self, source):
      self.source = source

    def __getitem__(self, index):
      read.append(index)
      return self.source[index]

  split._source = Counting(split._source)
  first = -(-int(split.lengths[0]) // 50)
  for start, stop, chunks in ((100, 150, [2]), (99, 151, [1, 2, 3]), (149, 150, [2])):
    read.clear()
    tokens, _ = split.read(1, start, stop)
    np.testing.assert_array_equal(tokens, documents["video"][1].tokens[start:stop])
    assert read == [first + chunk for chunk in chunks]


def test_the_entropy_of_one_token_is_not_negative_zero():
  assert f"{entropy(np.array([0, 3])):.3f}" == "0.000"


def test_manifest_counts_targets_and_their_entropy(datasets, documents, tokenizer):
  for name, path in datasets.items():
    dataset = Dataset(path)
    targets = np.concatenate([d.tokens[1:][d.loss_mask[1:]] for d in documents[name]])
    is_vision = targets >= tokenizer.vocab_size
    summary = dataset.manifest["splits"]["train"]
    assert summary["targets"] == {"text": (~is_vision).sum(), "vision": is_vision.sum()}
    assert summary["tokens"] == sum(len(d.tokens) for d in documents[name])
    assert dataset.manifest["documents_by_source"][name] >= len(documents[name])
    for modality, where in (("text", ~is_vision), ("vision", is_vision)):
      if not where.any():
        assert modality not in dataset.unigram_entropy("train")
        continue
      _, counts = np.unique(targets[where], return_counts=True)
      p = counts / counts.sum()
      np.testing.assert_allclose(
        dataset.unigram_entropy("train")[modality], -(p * np.log(p)).sum(), rtol=1e-9
      )


def test_it_is_a_tfds_directory_without_tensorflow(datasets, documents):
  program = f"""
import sys
import tensorflow_datasets as tfds
source = tfds.builder_from_directory({datasets["text"]!r}).as_data_source()
record = source["train"][0]
assert "tensorflow" not in sys.modules
print(len(source["train"]), sorted(source), record["document"], record["offset"], *record["tokens"])
"""
  out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
  num_records = sum(-(-len(d.tokens) // 50) for d in documents["text"])
  tokens = documents["text"][0].tokens[:50].tolist()
  assert out.stdout.split() == [
    str(num_records),
    "['train',",
    "'validation']",
    "0",
    "0",
    *map(str, tokens),
  ]


def test_a_failed_run_leaves_nothing_and_touches_nothing(tokenizer, tmp_path):
  document = text_document(tokenizer, "a fox")
  with pytest.raises(KeyboardInterrupt):
    with DatasetWriter(tmp_path / "d", tokenizer) as writer:
      writer.write("train", document)
      raise KeyboardInterrupt
  assert not list(tmp_path.iterdir())
  with pytest.raises(UserError, match="no document"):
    with DatasetWriter(tmp_path / "d", tokenizer):
      pass
  assert not list(tmp_path.iterdir())

  with DatasetWriter(tmp_path / "d", tokenizer) as writer:
    writer.write("train", document)
    assert not (tmp_path / "d").exists()
  before = (tmp_path / "d" / "manifest.json").read_bytes()
  with pytest.raises(UserError, match="exists already"):
    DatasetWriter(tmp_path / "d", tokenizer)
  assert (tmp_path / "d" / "manifest.json").read_bytes() == before
  assert len(Dataset(tmp_path / "d").split("train")) == 1


def test_the_writer_refuses_bad_documents(tokenizer, tmp_path):
  with DatasetWriter(tmp_path / "d", tokenizer) as writer:
    with pytest.raises(BadDocument, match="counts in the loss"):
      writer.write("train", Document(np.array([1, 5, 2]), np.array([True, False, False])))
    too_large = tokenizer.vocab_size + 8448
    with pytest.raises(BadDocument, match=f"token {too_large} is not in"):
      writer.write("train", Document(np.array([1, too_large]), np.array([False, True])))
    writer.write("train", text_document(tokenizer, "a fox"))
  assert Dataset(tmp_path / "d").manifest["splits"]["train"]["documents"] == 1


def test_errors_name_the_files(tokenizer, datasets, tmp_path):
  train_sentencepiece(["another text"], tmp_path / "other.model", 270)
  other = load_tokenizer(tmp_path / "other.model")
  Dataset(datasets["text"]).check_tokenizer(tokenizer)
  with pytest.raises(UserError) as error:
    Dataset(datasets["text"]).check_tokenizer(other)
  for name in (datasets["text"], str(tokenizer.path), str(other.path)):
    assert name in str(error.value)
  with pytest.raises(UserError, match="no prepared dataset at .*nothing"):
    Dataset(tmp_path / "nothing")
  with pytest.raises(UserError, match="video has no validation documents"):
    Dataset(datasets["video"]).split("validation")


def test_files_hold_what_the_splits_say(datasets):
  builder = tfds.builder_from_directory(datasets["video"])
  split = Dataset(datasets["video"]).split("train")
  assert builder.info.splits["train"].num_examples == (-(-split.lengths // 50)).sum()
