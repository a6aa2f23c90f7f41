"""Parts of a dataset: each is written on its own, and parts are joined without copying tokens.

A part is a directory. It holds at most one ArrayRecord file per split, and the index of that file.
The same documents make the same bytes.
A directory of parts becomes a dataset when `join_parts` moves the files together and joins their
indices. See lwm/data/dataset.py for the format.

L tokens of a document or a chunk, V ids (text, then vision); a trailing 2 is the modality.
"""

import array
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from lwm.config.batch import MODALITIES
from lwm.config.vqgan import LWM_LAYOUT, VisionLayout
from lwm.data.dataset import FORMAT_VERSION
from lwm.data.documents import BadDocument, Document
from lwm.data.target_runs import target_runs
from lwm.data.tokenizer import Tokenizer

# 40 KB of ids and mask. Reading a slice reads at most two records more than it needs.
CHUNK_TOKENS = 8192
MANIFEST = "manifest.json"
_NAME = "tokens"
_SUMMARY = "part.json"
BAD_RECORDS = "bad_records.jsonl"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What the ids of a dataset mean.

  Attributes:
    tokenizer: encoded the text of the documents.
    vqgan_sha256: of the file of the VQGAN that the vision codes come from, if known.
    layout: of that VQGAN. It means nothing if no document holds vision tokens.
    chunk_tokens: tokens per record, at most.
  """

  tokenizer: Tokenizer
  vqgan_sha256: str | None = None
  layout: VisionLayout = LWM_LAYOUT
  chunk_tokens: int = CHUNK_TOKENS

  @property
  def size(self) -> int:
    return self.tokenizer.vocab_size + self.layout.vocab_size


class _SplitIndex:
  """The records of a split, and what the part's index says of them."""

  def __init__(self, file: ArrayRecordWriter, first_number: int, vocab_size: int):
    self._file = file
    self.first_number = first_number
    self.records = 0
    self.bytes = 0
    self.tokens = 0
    self.vision_tokens = 0
    self.lengths = array.array("q")
    self.targets = array.array("q")
    self.target_runs = array.array("q")
    self.histogram_V = np.zeros(vocab_size, np.int64)

  def write(self, record: bytes) -> None:
    self._file.write(record)
    self.records += 1
    self.bytes += len(record)

  def save(self, directory: pathlib.Path, name: str) -> None:
    self._file.close()
    lengths = np.frombuffer(self.lengths, np.int64)
    arrays = {
      "numbers": self.first_number + np.arange(len(lengths)),
      "lengths": lengths,
      "targets": np.frombuffer(self.targets, np.int64).reshape(-1, len(MODALITIES)),
      "target_runs": np.frombuffer(self.target_runs, np.int64).reshape(-1, 3),
      "histogram": self.histogram_V,
    }
    for field, values in arrays.items():
      np.save(directory / f"{name}_{field}.npy", values)


class PartWriter:
  """Writes the documents of one part. Memory does not grow with the length of a document."""

  def __init__(
    self, directory: pathlib.Path, vocabulary: Vocabulary, first_number: Callable[[str], int]
  ):
    """
    Args:
      directory: is made.
      vocabulary: of the documents.
      first_number: of the part's first document, by the name of the split. The numbers of the
        documents are part of their records, and different in all parts of a dataset.
    """
    directory.mkdir()
    self.directory = directory
    self.bad_records = 0
    self._vocabulary = vocabulary
    self._first_number = first_number
    self._splits: dict[str, _SplitIndex] = {}
    self._sources: dict[str, int] = {}
    (directory / BAD_RECORDS).touch()
    self._features = _dataset_info(directory).features
    self._serializer = ExampleSerializer(self._features.get_serialized_info())

  def write(self, split: str, document: Document, source: str = "") -> None:
    """Appends a document to a split. The manifest counts the documents of each `source`.

    Raises:
      BadDocument: no token counts in the loss as a target, or an id is out of range.
    """
    tokens = np.asarray(document.tokens, np.int32)
    if not np.any(document.loss_mask[1:]):
      raise BadDocument("no token counts in the loss")
    size = self._vocabulary.size
    if tokens.min() < 0 or tokens.max() >= size:
      wrong = tokens[(tokens < 0) | (tokens >= size)][0]
      raise BadDocument(f"token {wrong} is not in [0, {size})")
    self.write_pieces(split, [document], source)

  def write_pieces(self, split: str, pieces: Iterable[Document], source: str = "") -> None:
    """Appends the document that consists of `pieces`, whose ids are not checked."""
    if split not in self._splits:
      first = self._first_number(split)
      file = ArrayRecordWriter(str(self.directory / _records_file(split)), "group_size:1")
      self._splits[split] = _SplitIndex(file, first, self._vocabulary.size)
    index = self._splits[split]
    number = index.first_number + len(index.lengths)
    length, targets_2 = 0, np.zeros(len(MODALITIES), np.int64)
    for tokens, loss_mask in _chunks(pieces, self._vocabulary.chunk_tokens):
      record = {"document": number, "offset": length, "tokens": tokens, "loss_mask": loss_mask}
      example = self._serializer.get_tf_example(self._features.encode_example(record))
      # By default, the order of the fields differs from process to process.
      index.write(example.SerializeToString(deterministic=True))
      targets_2 += self._count(index, length == 0, tokens, loss_mask)
      length += len(tokens)
    index.lengths.append(length)
    index.targets.extend(targets_2.tolist())
    self._sources[source] = self._sources.get(source, 0) + 1

  def _count(
    self, index: _SplitIndex, is_first: bool, tokens: np.ndarray, loss_mask: np.ndarray
  ) -> np.ndarray:
    """Adds a chunk of a document to the index. Returns its targets by modality: int64 [2]."""
    is_vision = tokens >= self._vocabulary.tokenizer.vocab_size
    # The first token of a document is never a target.
    skipped = int(is_first)
    lead = np.zeros(1 - skipped, bool)
    runs_Rx3 = target_runs(np.append(lead, loss_mask), np.append(lead, is_vision))
    runs_Rx3[:, :2] += index.tokens - len(lead)
    runs = index.target_runs
    continues = not is_first and len(runs) and len(runs_Rx3)
    if continues and runs[-2:].tolist() == runs_Rx3[0, ::2].tolist():
      # The last run of the chunk before continues here.
      runs[-2] = int(runs_Rx3[0, 1])
      runs_Rx3 = runs_Rx3[1:]
    runs.frombytes(runs_Rx3.tobytes())
    targets = tokens[skipped:][loss_mask[skipped:] > 0]
    vision = int((targets >= self._vocabulary.tokenizer.vocab_size).sum())
    index.tokens += len(tokens)
    index.vision_tokens += int(is_vision.sum())
    index.histogram_V += np.bincount(targets, minlength=self._vocabulary.size)
    return np.array([len(targets) - vision, vision])

  @property
  def num_records(self) -> int:
    return sum(index.records for index in self._splits.values())

  def bad(self, where: str, reason: str) -> None:
    """Reports a record that was skipped; `where` is file:line, or what names the record best."""
    self.bad_records += 1
    with open(self.directory / BAD_RECORDS, "a") as file:
      file.write(json.dumps({"where": where, "reason": reason}) + "\n")

  def close(self) -> None:
    """Completes the files."""
    splits = {}
    for name, index in self._splits.items():
      index.save(self.directory, name)
      splits[name] = {
        "tokens": index.tokens,
        "vision_tokens": index.vision_tokens,
        "records": index.records,
        "bytes": index.bytes,
      }
    summary = {"bad_records": self.bad_records, "sources": self._sources, "splits": splits}
    (self.directory / _SUMMARY).write_text(json.dumps(summary))


def _chunks(
  pieces: Iterable[Document], chunk_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Cuts a document in pieces into chunks: int32 and uint8 [L].

  L is chunk_tokens, except in the last chunk.
  """
  tokens, loss_mask = np.zeros(0, np.int32), np.zeros(0, np.uint8)
  for piece in pieces:
    tokens = np.append(tokens, np.asarray(piece.tokens, np.int32))
    loss_mask = np.append(loss_mask, np.asarray(piece.loss_mask, np.uint8))
    whole = len(tokens) // chunk_tokens * chunk_tokens
    for start in range(0, whole, chunk_tokens):
      yield tokens[start : start + chunk_tokens], loss_mask[start : start + chunk_tokens]
    tokens, loss_mask = tokens[whole:], loss_mask[whole:]
  if len(tokens):
    yield tokens, loss_mask


def _records_file(split: str) -> str:
  return f"{split}.array_record"


def _dataset_info(directory: pathlib.Path) -> tfds.core.DatasetInfo:
  tensor = tfds.features.Tensor
  features = tfds.features.FeaturesDict(
    {
      "document": np.int64,
      "offset": np.int64,
      "tokens": tensor(shape=(None,), dtype=np.int32, encoding="bytes"),
      "loss_mask": tensor(shape=(None,), dtype=np.uint8, encoding="bytes"),
    }
  )
  identity = tfds.core.DatasetIdentity(
    name=_NAME, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name="lwm.data"
  )
  return tfds.core.DatasetInfo(
    builder=identity, description="Token documents (lwm/data/dataset.py).", features=features
  )


def join_parts(
  parts: Sequence[pathlib.Path],
  directory: pathlib.Path,
  vocabulary: Vocabulary,
  settings: Mapping[str, Any],
) -> dict[str, Any]:
  """Moves the parts' files into one dataset, in the order of the parts.

  A killed join is continued by another one with the same arguments. The manifest comes last.

  Args:
    parts: directories that `PartWriter` completed.
    directory: is made; it is a dataset afterwards.
    vocabulary: of all documents.
    settings: how the documents were made, as JSON values by name, for the manifest.

  Returns:
    The manifest. It has no splits, and is not written, if there is no document.
  """
  directory.mkdir(exist_ok=True)
  summaries = [json.loads((part / _SUMMARY).read_text()) for part in parts]
  sources: dict[str, int] = {}
  for summary in summaries:
    for source, count in summary["sources"].items():
      sources[source] = sources.get(source, 0) + count
  names = list(dict.fromkeys(name for summary in summaries for name in summary["splits"]))
  manifest = {
    "format_version": FORMAT_VERSION,
    "tokenizer": {"path": str(vocabulary.tokenizer.path), "sha256": vocabulary.tokenizer.sha256},
    "vqgan_sha256": vocabulary.vqgan_sha256,
    "text_vocab_size": vocabulary.tokenizer.vocab_size,
    "vision_layout": None,
    "chunk_tokens": vocabulary.chunk_tokens,
    "settings": dict(settings),
    "bad_records": sum(summary["bad_records"] for summary in summaries),
    "documents_by_source": sources,
    "splits": {},
  }
  if not names:
    return manifest
  infos = []
  for name in names:
    with_split = [
      (part, summary["splits"][name])
      for part, summary in zip(parts, summaries)
      if name in summary["splits"]
    ]
    split, info = _join_split(name, with_split, directory, vocabulary)
    manifest["splits"][name] = split
    infos.append(info)
    if split["vision_tokens"]:
      manifest["vision_layout"] = dataclasses.asdict(vocabulary.layout)
  info = _dataset_info(directory)
  info.set_file_format("array_record")
  info.set_splits(tfds.core.splits.SplitDict(infos))
  info.write_to_directory(directory)
  with open(directory / BAD_RECORDS, "wb") as file:
    for part in parts:
      file.write((part / BAD_RECORDS).read_bytes())
  unfinished = directory / f"{MANIFEST}.unfinished"
  unfinished.write_text(json.dumps(manifest, indent=2) + "\n")
  unfinished.rename(directory / MANIFEST)
  return manifest


def _join_split(
  name: str,
  parts: Sequence[tuple[pathlib.Path, dict[str, int]]],
  directory: pathlib.Path,
  vocabulary: Vocabulary,
) -> tuple[dict[str, Any], tfds.core.SplitInfo]:
  """Joins one split: the manifest's entry and TFDS's own."""
  template = tfds.core.ShardedFileTemplate(
    dataset_name=_NAME,
    data_dir=directory,
    split=name,
    filetype_suffix="array_record",
    template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
  )
  joined: dict[str, list[np.ndarray]] = {
    field: [] for field in ("numbers", "lengths", "targets", "target_runs")
  }
  histogram_V = np.zeros(vocabulary.size, np.int64)
  tokens = 0
  for index, (part, summary) in enumerate(parts):
    target = template.sharded_filepath(shard_index=index, num_shards=None)
    source = part / _records_file(name)
    if source.exists():  # A join that was killed has moved it.
      source.rename(target)
    for field, arrays in joined.items():
      arrays.append(np.load(part / f"{name}_{field}.npy"))
    joined["target_runs"][-1][:, :2] += tokens
    histogram_V += np.load(part / f"{name}_histogram.npy")
    tokens += summary["tokens"]
  index_of = {field: np.concatenate(arrays) for field, arrays in joined.items()}
  for field, values in index_of.items():
    np.save(directory / f"{name}_{field}.npy", values)
  histograms = np.split(histogram_V, [vocabulary.tokenizer.vocab_size])
  entry = {
    "documents": len(index_of["lengths"]),
    "tokens": tokens,
    "longest_document": int(index_of["lengths"].max()),
    "vision_tokens": sum(summary["vision_tokens"] for _, summary in parts),
    "targets": dict(zip(MODALITIES, index_of["targets"].sum(0).tolist())),
    "target_runs": len(index_of["target_runs"]),
    "parts": len(parts),
    "unigram_entropy": {
      modality: entropy(histogram)
      for modality, histogram in zip(MODALITIES, histograms)
      if histogram.any()
    },
  }
  info = tfds.core.SplitInfo(
    name=name,
    shard_lengths=[summary["records"] for _, summary in parts],
    num_bytes=sum(summary["bytes"] for _, summary in parts),
    filename_template=template,
  )
  return entry, info


def first_problem(parts: Sequence[pathlib.Path]) -> str:
  """Where the first bad record of the parts is, and why it is bad."""
  lines = (line for part in parts for line in (part / BAD_RECORDS).read_text().splitlines())
  record = json.loads(next(lines))
  return f"{record['where']}: {record['reason'].removesuffix('.')}"


def entropy(counts: np.ndarray) -> float:
  """Entropy, in nats, of the distribution proportional to `counts`."""
  p = counts[counts > 0] / counts.sum()
  return abs(float((p * np.log(p)).sum()))
