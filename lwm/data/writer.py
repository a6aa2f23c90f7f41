"""Writing a prepared dataset: see lwm/data/dataset.py for the format.

L tokens of a document, V ids (text, then vision).
"""

import array
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import types
from typing import Self

import numpy as np
import tensorflow_datasets as tfds

from lwm.config.batch import MODALITIES
from lwm.config.vqgan import LWM_LAYOUT, VisionLayout
from lwm.data.dataset import FORMAT_VERSION
from lwm.data.documents import BadDocument, Document
from lwm.data.target_runs import target_runs
from lwm.data.tokenizer import Tokenizer
from lwm.errors import UserError

# 40 KB of ids and mask. Reading a slice reads at most two records more than it needs.
CHUNK_TOKENS = 8192
_RECORDS_PER_FILE = 16384
_RECORDS_PER_WRITE = 256


class _SplitCounts:
  """What the index and the manifest record of a split."""

  def __init__(self, vocab_size: int):
    self.tokens = 0
    self.lengths = array.array("q")
    self.targets = array.array("q")
    self.target_runs = array.array("q")
    self.vision_tokens = 0
    self.histogram_V = np.zeros(vocab_size, np.int64)


class DatasetWriter:
  """Writes documents. The dataset appears at `path` only once everything is written.

      with DatasetWriter(path, tokenizer) as writer:
        writer.write("train", text_document(tokenizer, text), source="book.txt")

  An error inside the `with` leaves nothing at `path`. An existing dataset is never touched.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    vqgan_sha256: str | None = None,
    layout: VisionLayout = LWM_LAYOUT,
    chunk_tokens: int = CHUNK_TOKENS,
  ):
    """
    Args:
      path: directory to make; its parents are made too.
      tokenizer: encoded the text of the documents.
      vqgan_sha256: of the file of the VQGAN that the vision codes come from, if known.
      layout: of that VQGAN. It means nothing if no document holds vision tokens.
      chunk_tokens: tokens per record, at most.

    Raises:
      UserError: `path` exists already.
    """
    self.path = pathlib.Path(path)
    if self.path.exists():
      raise UserError(f"{path} exists already: delete it, or name another output.")
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._unfinished = self.path.with_name(f".{self.path.name}.unfinished-{os.getpid()}")
    self._tokenizer = tokenizer
    self._vqgan_sha256 = vqgan_sha256
    self._layout = layout
    self._chunk_tokens = chunk_tokens
    self._vocab_size = tokenizer.vocab_size + layout.vocab_size
    self._counts: dict[str, _SplitCounts] = {}
    self._sources: dict[str, int] = {}
    self._pending: dict[str, list[dict]] = {}
    self.bad_records = 0

  def __enter__(self) -> Self:
    shutil.rmtree(self._unfinished, ignore_errors=True)
    self._unfinished.mkdir()
    self._bad_file = open(self._unfinished / "bad_records.jsonl", "w")
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
      name="tokens",
      version=tfds.core.Version("1.0.0"),
      data_dir=str(self._unfinished),
      module_name="lwm.data",
    )
    info = tfds.core.DatasetInfo(
      builder=identity, description="Token documents (lwm/data/dataset.py).", features=features
    )
    self._records = tfds.core.SequentialWriter(info, _RECORDS_PER_FILE, file_format="array_record")
    return self

  def __exit__(
    self,
    error_type: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    self._bad_file.close()
    try:
      if error_type is None:
        self._finish()
        self._unfinished.rename(self.path)
    finally:
      with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(self._unfinished)

  def write(self, split: str, document: Document, source: str = "") -> None:
    """Appends a document to a split. The manifest counts the documents of each `source`.

    Raises:
      BadDocument: no token counts in the loss as a target, or an id is out of range.
    """
    tokens = np.asarray(document.tokens, np.int32)
    loss_mask = np.asarray(document.loss_mask, np.uint8)
    if not loss_mask[1:].any():
      raise BadDocument("no token counts in the loss")
    if tokens.min() < 0 or tokens.max() >= self._vocab_size:
      wrong = tokens[(tokens < 0) | (tokens >= self._vocab_size)][0]
      raise BadDocument(f"token {wrong} is not in [0, {self._vocab_size})")

    if split not in self._counts:
      self._counts[split] = _SplitCounts(self._vocab_size)
      self._pending[split] = []
      self._records.initialize_splits([split])
    counts, pending = self._counts[split], self._pending[split]
    for offset in range(0, len(tokens), self._chunk_tokens):
      pending.append(
        {
          "document": len(counts.lengths),
          "offset": offset,
          "tokens": tokens[offset : offset + self._chunk_tokens],
          "loss_mask": loss_mask[offset : offset + self._chunk_tokens],
        }
      )
    if len(pending) >= _RECORDS_PER_WRITE:
      self._flush(split)

    is_vision = tokens >= self._tokenizer.vocab_size
    runs_Rx3 = target_runs(loss_mask, is_vision)
    runs_Rx3[:, :2] += counts.tokens
    counts.target_runs.frombytes(runs_Rx3.tobytes())
    # The first token of a document is never a target.
    targets = tokens[1:][loss_mask[1:] > 0]
    vision = int((targets >= self._tokenizer.vocab_size).sum())
    counts.tokens += len(tokens)
    counts.lengths.append(len(tokens))
    counts.targets.extend((len(targets) - vision, vision))
    counts.vision_tokens += int(is_vision.sum())
    counts.histogram_V += np.bincount(targets, minlength=self._vocab_size)
    self._sources[source] = self._sources.get(source, 0) + 1

  @property
  def splits(self) -> list[str]:
    """The names of the splits that have documents."""
    return list(self._counts)

  def bad(self, where: str, reason: str) -> None:
    """Reports a record that was skipped; `where` is file:line, or what names the record best."""
    self.bad_records += 1
    self._bad_file.write(json.dumps({"where": where, "reason": reason}) + "\n")

  def _flush(self, split: str) -> None:
    self._records.add_examples({split: self._pending[split]})
    self._pending[split] = []

  def _finish(self) -> None:
    if not self._counts:
      raise UserError(f"Nothing to write to {self.path}: there is no document.")
    for split in self._counts:
      self._flush(split)
    self._records.close_all()
    splits = {}
    for name, counts in self._counts.items():
      lengths = np.frombuffer(counts.lengths, np.int64)
      targets = np.frombuffer(counts.targets, np.int64).reshape(-1, len(MODALITIES))
      np.save(self._unfinished / f"{name}_lengths.npy", lengths)
      np.save(self._unfinished / f"{name}_targets.npy", targets)
      runs_Rx3 = np.frombuffer(counts.target_runs, np.int64).reshape(-1, 3)
      np.save(self._unfinished / f"{name}_target_runs.npy", runs_Rx3)
      histograms = np.split(counts.histogram_V, [self._tokenizer.vocab_size])
      splits[name] = {
        "documents": len(lengths),
        "tokens": counts.tokens,
        "longest_document": int(lengths.max()),
        "vision_tokens": counts.vision_tokens,
        "targets": dict(zip(MODALITIES, targets.sum(0).tolist())),
        "target_runs": len(runs_Rx3),
        "unigram_entropy": {
          modality: entropy(histogram)
          for modality, histogram in zip(MODALITIES, histograms)
          if histogram.any()
        },
      }
    has_vision = any(counts.vision_tokens for counts in self._counts.values())
    manifest = {
      "format_version": FORMAT_VERSION,
      "tokenizer": {"path": str(self._tokenizer.path), "sha256": self._tokenizer.sha256},
      "vqgan_sha256": self._vqgan_sha256,
      "text_vocab_size": self._tokenizer.vocab_size,
      "vision_layout": dataclasses.asdict(self._layout) if has_vision else None,
      "chunk_tokens": self._chunk_tokens,
      "bad_records": self.bad_records,
      "documents_by_source": self._sources,
      "splits": splits,
    }
    (self._unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def entropy(counts: np.ndarray) -> float:
  """Entropy, in nats, of the distribution proportional to `counts`."""
  p = counts[counts > 0] / counts.sum()
  return abs(float((p * np.log(p)).sum()))
