"""A prepared dataset: token documents in ArrayRecord files, a manifest, and an index of lengths.

D documents of a split, R runs of targets; a trailing 2 is the modality (lwm/config/batch.py).

The directory is a TensorFlow Datasets directory (`tfds.builder_from_directory(path)`), with

  tokens-SPLIT.array_record-*   records of at most `chunk_tokens` tokens of one document, so that
                                reading a slice of a long document reads only the records that
                                overlap it; fields document, offset, tokens (int32), loss_mask
                                (uint8)
  SPLIT_numbers.npy             int64 [D], what the records of each document have in the field
                                document; datasets prepared by older versions have none, and count
                                from 0
  SPLIT_lengths.npy             int64 [D], tokens of each document
  SPLIT_targets.npy             int64 [D, 2], tokens that count in the loss, by modality
  SPLIT_target_runs.npy         int64 [R, 3], where they are: see lwm/data/target_runs.py; datasets
                                prepared by older versions have none
  manifest.json                 what the dataset was made with and what it holds; see
                                `DatasetWriter`
  bad_records.jsonl             the records that were skipped: where, and why
"""

import functools
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds

from lwm.config.vqgan import LWM_LAYOUT, VisionLayout
from lwm.data.target_runs import TargetRuns
from lwm.data.tokenizer import Tokenizer
from lwm.errors import UserError

FORMAT_VERSION = 1
TRAIN = "train"
VALIDATION = "validation"

_FIX = "restore the file from a copy, or prepare the dataset again"


class Split:
  """The documents of one split. Reading is safe from any number of threads."""

  def __init__(
    self,
    path: pathlib.Path,
    name: str,
    *,
    chunk_tokens: int,
    stored_text_ids: int,
    text_ids: int,
    has_target_runs: bool,
    has_numbers: bool,
    source: Sequence[dict],
    files: Sequence[tuple[str, int]],
  ):
    """
    Args:
      path: of the dataset.
      name: of the split.
      chunk_tokens: tokens per record, at most.
      stored_text_ids: number of text ids in the records; vision ids follow them.
      text_ids: number of text ids in what is read.
      has_target_runs: whether the split was written with its runs of targets.
      has_numbers: whether it was written with the numbers of its documents.
      source: its records.
      files: the files of the records, each with its number of records.

    Raises:
      UserError: the index is damaged or missing.
    """
    self.path = path
    self.name = name
    self._files = files
    self.lengths = _load_index(path / f"{name}_lengths.npy")
    self.targets = _load_index(path / f"{name}_targets.npy")
    # None if the dataset was prepared by an older version.
    self.target_runs = None
    if has_target_runs:
      self.target_runs = TargetRuns(self.lengths, _load_index(path / f"{name}_target_runs.npy"))
    self._numbers = (
      _load_index(path / f"{name}_numbers.npy") if has_numbers else np.arange(len(self.lengths))
    )
    self._chunk_tokens = chunk_tokens
    self._stored_text_ids = stored_text_ids
    self._vision_shift = np.int32(text_ids - stored_text_ids)
    self._source = source
    records = -(-self.lengths // chunk_tokens)
    self._first_record = np.cumsum(records) - records

  def __len__(self) -> int:
    """The number of documents."""
    return len(self.lengths)

  def read(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [start, stop) of a document (start < stop): int32 and bool [stop - start].

    Only the records that overlap the slice are read.

    Raises:
      UserError: one of these records is damaged, or its file is missing.
    """
    first, last = start // self._chunk_tokens, (stop - 1) // self._chunk_tokens
    records = [self._record(document, chunk) for chunk in range(first, last + 1)]
    inside = slice(start - first * self._chunk_tokens, stop - first * self._chunk_tokens)
    tokens, loss_mask = records[0]["tokens"], records[0]["loss_mask"]
    if len(records) > 1:
      tokens = np.concatenate([record["tokens"] for record in records])
      loss_mask = np.concatenate([record["loss_mask"] for record in records])
    tokens = tokens[inside]
    if self._vision_shift:
      tokens = np.where(tokens < self._stored_text_ids, tokens, tokens + self._vision_shift)
    return tokens, loss_mask[inside].astype(bool)

  def _record(self, document: int, chunk: int) -> dict:
    index = int(self._first_record[document]) + chunk
    try:
      record = self._source[index]
      belongs_to = record["document"], record["offset"]
    except Exception as error:  # ArrayRecord and TFDS raise all kinds, and none names the record.
      raise self._bad_record(index, str(error).partition("\n")[0]) from error
    number = self._numbers[document]
    if belongs_to != (number, chunk * self._chunk_tokens):
      raise self._bad_record(index, f"it belongs to document {belongs_to[0]}, not {number}")
    return record

  def _bad_record(self, index: int, reason: str) -> UserError:
    for file, records in self._files:
      if index < records:
        break
      index -= records
    return UserError(
      f"Record {index} of {file} cannot be read ({reason}): {_FIX}; then run the same command "
      "again to resume from the last checkpoint."
    )


def _load_index(path: pathlib.Path) -> np.ndarray:
  try:
    return np.load(path)
  except (OSError, EOFError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path} cannot be read ({reason}): {_FIX}.") from error


class Dataset:
  """A prepared dataset on disk, opened for reading."""

  def __init__(self, path: str | os.PathLike, text_vocab_size: int | None = None):
    """
    Args:
      path: its directory.
      text_vocab_size: number of text ids of the model that reads it, at least as many as its
        tokenizer has; vision ids follow them. Default: as many as its tokenizer has.

    Raises:
      UserError: `path` is not a complete dataset, or has more text ids than the model.
    """
    self.path = pathlib.Path(path)
    try:
      self.manifest = json.loads((self.path / "manifest.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
      raise UserError(
        f"There is no prepared dataset at {path} (no manifest.json): make one with "
        "`python -m experiments.prepare_data`."
      ) from None
    except json.JSONDecodeError as error:
      raise UserError(f"{path}/manifest.json is damaged ({error}): {_FIX}.") from None
    if self.manifest.get("format_version") != FORMAT_VERSION:
      raise UserError(
        f"Dataset {path} has format {self.manifest.get('format_version')}, but this program reads "
        f"format {FORMAT_VERSION}: prepare the dataset again."
      )
    own = self.manifest["text_vocab_size"]
    self.text_vocab_size = own if text_vocab_size is None else text_vocab_size
    if self.text_vocab_size < own:
      raise UserError(
        f"Dataset {path} has {own} text ids, but config.model.text_vocab_size is "
        f"{text_vocab_size}: set it to at least the tokenizer's size."
      )

  @property
  def has_vision(self) -> bool:
    return any(split["vision_tokens"] for split in self.manifest["splits"].values())

  @property
  def vision_layout(self) -> VisionLayout | None:
    """The layout of the vision tokens; None if the dataset has none."""
    if not self.has_vision:
      return None
    # Manifests of older versions record no layout: all datasets had LWM's.
    recorded = self.manifest.get("vision_layout")
    return VisionLayout(**recorded) if recorded else LWM_LAYOUT

  @functools.cached_property
  def _builder(self) -> tfds.core.DatasetBuilder:
    try:
      return tfds.builder_from_directory(str(self.path))
    except Exception as error:  # TFDS raises all kinds.
      raise UserError(
        f"{self.path}/dataset_info.json or features.json cannot be read "
        f"({str(error).partition('\n')[0]}): {_FIX}."
      ) from error

  def has_split(self, name: str) -> bool:
    return name in self.manifest["splits"]

  def split(self, name: str) -> Split:
    """Raises UserError if the dataset has no such split, or is damaged."""
    if not self.has_split(name):
      raise UserError(
        f"Dataset {self.path} has no {name} documents, only "
        f"{', '.join(self.manifest['splits'])}: prepare the dataset again with some."
      )
    info = self._builder.info.splits[name]
    return Split(
      self.path,
      name,
      chunk_tokens=self.manifest["chunk_tokens"],
      stored_text_ids=self.manifest["text_vocab_size"],
      text_ids=self.text_vocab_size,
      has_target_runs="target_runs" in self.manifest["splits"][name],
      has_numbers="parts" in self.manifest["splits"][name],
      source=self._builder.as_data_source(name),
      files=list(zip(map(str, info.filepaths), info.shard_lengths)),
    )

  def unigram_entropy(self, split: str) -> dict[str, float]:
    """Nats per target, by modality: the loss of the best model that sees no context."""
    return self.manifest["splits"][split]["unigram_entropy"]

  def check_tokenizer(self, tokenizer: Tokenizer) -> None:
    """Raises UserError unless the dataset was prepared with this tokenizer file."""
    made_with = self.manifest["tokenizer"]
    if made_with["sha256"] != tokenizer.sha256:
      raise UserError(
        f"Dataset {self.path} was prepared with tokenizer {made_with['path']} (sha256 "
        f"{made_with['sha256'][:12]}), not with {tokenizer.path} (sha256 "
        f"{tokenizer.sha256[:12]}): prepare the dataset again, or use its tokenizer."
      )
