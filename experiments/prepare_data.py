"""Tokenises raw documents into a dataset that training reads.

Text files, one document per file. The second command takes files of another suffix:

    python -m experiments.prepare_data --input=books/ --tokenizer=tokenizer.model \\
        --train_tokenizer_vocab=4096 --output=data/books
    python -m experiments.prepare_data --source=text --suffix=.py --input=code/ ...

JSON lines, a JSON array, Parquet or a TensorFlow Datasets dataset, one document per record. One
flag names the part of the record to take: --fields for text and vision codes (see
lwm/data/documents.py), --chat_field for messages with the tokenizer's chat template (see
lwm/data/chat.py), or --ids_field for token ids, to which <bos> and <eos> are added if missing:

    python -m experiments.prepare_data --input=books.jsonl.gz --fields=text ...
    python -m experiments.prepare_data --input=answers.jsonl --fields='[instruction],output' ...
    python -m experiments.prepare_data --input=chats.parquet --chat_field=messages ...
    python -m experiments.prepare_data --input=tokenised.parquet --ids_field=input_ids ...
    python -m experiments.prepare_data --source=tfds --input=lm1b --fields=text ...

--source names the kind of input: text (.txt), jsonl (.jsonl), json (.json), parquet (.parquet) or
tfds. Without it, the suffix of the file or the only kind of file in the folder decides. Files may
be compressed (.gz, .zst). Links are followed.

The output is written in full or not at all. A killed command continues when it is given again.
With --num_shards, several workers share the work; the command without it then joins their parts
into the dataset (docs/films.md). OUTPUT/bad_records.jsonl names every bad record and file, with the
reason. The printed summary counts the files that were left out, by kind. lwm/data/dataset.py
describes the output.
"""

import os
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import dataset_summary, flags as experiment_flags, shards
from lwm.data import prepare, sources
from lwm.data.dataset import TRAIN, VALIDATION, Dataset
from lwm.data.parts import Vocabulary
from lwm.data.tokenizer import load_tokenizer, train_sentencepiece
from lwm.data.writer import DatasetParts
from lwm.errors import UserError

_SOURCE = flags.DEFINE_enum(
  "source", None, [*sources.READERS, "tfds"], "Kind of input; the suffix decides if left out."
)
_INPUT = flags.DEFINE_string(
  "input", None, "File, folder, or name of a TFDS dataset.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make.", required=True)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "A *.model or tokenizer.json file.", required=True
)
_TRAIN_TOKENIZER_VOCAB = flags.DEFINE_integer(
  "train_tokenizer_vocab",
  None,
  "Train a tokenizer of this size on the documents of --input that are not held out, and write it "
  "to --tokenizer.",
)
_SUFFIX = flags.DEFINE_string(
  "suffix", None, "Suffix of the files to take from a folder, if not the usual one of --source."
)
_FIELDS = flags.DEFINE_multi_string(
  "fields",
  [],
  "The record's fields to take, as LWM's fields specification. If given several times, each record "
  "takes one of them.",
)
_FIELDS_FROM = flags.DEFINE_string(
  "fields_from", "fields", "Without --fields: the field with each record's own specification."
)
_CHAT_FIELD = flags.DEFINE_string(
  "chat_field", None, "The record's field of messages: a list of {role, content}."
)
_IDS_FIELD = flags.DEFINE_string(
  "ids_field", None, "The record's field of token ids, from the same tokenizer."
)
_TEXT_FEATURE = flags.DEFINE_string("text_feature", "text", "tfds: the feature that is the text.")
_TFDS_SPLIT = flags.DEFINE_string("tfds_split", "train", "tfds: the split to take.")
_TFDS_DATA_DIR = flags.DEFINE_string("tfds_data_dir", None, "tfds: where it keeps datasets.")
_VALIDATION_INPUT = flags.DEFINE_string(
  "validation_input",
  None,
  "File or folder of held-out documents (tfds: a split). Its files are left out of --input.",
)
_VALIDATION_FRACTION = flags.DEFINE_float(
  "validation_fraction", 0.0, "Share of --input's documents to hold out, chosen by hash."
)
_RECORDS_PER_PART = flags.DEFINE_integer(
  "records_per_part",
  4096,
  "Records to write at a time; a killed command makes its unfinished part again.",
  lower_bound=1,
)
_SUBSAMPLE_FRAMES = flags.DEFINE_integer(
  "subsample_frames",
  None,
  "Frames to keep per field of vision codes, spread evenly; all by default.",
  lower_bound=1,
)
_SHARDS = shards.Shards()
flags.adopt_module_key_flags(shards)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the choice among several --fields.")


def _open(kind: str | None, held_out: str | None = None) -> sources.Source:
  """Opens the source that the flags name, or the path or split of its held-out documents."""
  if kind == "tfds":
    split = held_out or _TFDS_SPLIT.value
    return sources.TfdsSource(_INPUT.value, split, _features(), _TFDS_DATA_DIR.value)
  return sources.FileSource(held_out or _INPUT.value, kind, _SUFFIX.value)


def _open_held_out(source: sources.Source) -> sources.Source:
  """Opens the source of --validation_input, and leaves its files out of the `source` of --input.

  Raises:
    UserError: no file remains, or two TFDS splits overlap.
  """
  held_out = _open(source.kind, _VALIDATION_INPUT.value)
  if isinstance(source, sources.TfdsSource) and isinstance(held_out, sources.TfdsSource):
    if source.overlaps(held_out):
      raise UserError(
        f"--validation_input={_VALIDATION_INPUT.value} and --tfds_split={_TFDS_SPLIT.value} have "
        "examples in common: name two splits, such as train[90%:] and train[:90%]."
      )
  elif isinstance(source, sources.FileSource) and isinstance(held_out, sources.FileSource):
    source.leave_out(held_out)
  return held_out


def _refuse_idle_flags(source: sources.Source) -> None:
  """Raises UserError for a flag that has no effect on this source."""
  of_tfds = (_TEXT_FEATURE, _TFDS_SPLIT, _TFDS_DATA_DIR)
  of_files = (_SUFFIX, _FIELDS_FROM)
  for flag in of_files if source.kind == "tfds" else of_tfds:
    if flag.present:
      raise UserError(f"--{flag.name} has no effect on {source.kind} input: leave it out.")
  if _SUFFIX.value and not any(map(os.path.isdir, (_INPUT.value, _VALIDATION_INPUT.value or ""))):
    raise UserError(
      f"--suffix chooses files in a folder, and --input={_INPUT.value} is a file: leave it out."
    )


def _features() -> set[str]:
  """The names of the features that the flags take from a TFDS dataset."""
  named = _CHAT_FIELD.value or _IDS_FIELD.value
  if named or not _FIELDS.value:
    return {named or _TEXT_FEATURE.value}
  return set(re.findall(r"[^\[\],+\s]+", ",".join(_FIELDS.value))) - {"<|bos|>", "<|eos|>"}


def _to_document(source: sources.Source) -> prepare.ToDocument:
  """How the flags make a document of a record."""
  choices = (_FIELDS, _CHAT_FIELD, _IDS_FIELD, _TEXT_FEATURE, _FIELDS_FROM)
  given = [flag.name for flag in choices if flag.present]
  if len(given) > 1:
    raise UserError(
      f"Give --{given[0]} or --{given[1]}, not both: each says what the document is made of."
    )
  has_codes = bool(source.kind != "text" and not (_CHAT_FIELD.value or _IDS_FIELD.value))
  if _SUBSAMPLE_FRAMES.value and not has_codes:
    raise UserError("--subsample_frames is for vision codes in --fields: leave it out.")
  if source.kind == "text":
    if given:
      raise UserError(f"--{given[0]} is for records with fields; text files have none.")
    return prepare.from_text
  if _CHAT_FIELD.value:
    return prepare.from_chat(_CHAT_FIELD.value)
  if _IDS_FIELD.value:
    return prepare.from_ids(_IDS_FIELD.value)
  if source.kind == "tfds" and not _FIELDS.value:
    return prepare.from_text_field(_TEXT_FEATURE.value)
  return prepare.from_fields(
    _FIELDS.value, _FIELDS_FROM.value, _SEED.value, _SUBSAMPLE_FRAMES.value
  )


def work(share: shards.Share) -> Callable[[], None]:
  """Makes a share of the parts. Returns what makes the dataset when all parts are complete."""
  if not 0 <= _VALIDATION_FRACTION.value < 1:
    raise UserError(f"--validation_fraction={_VALIDATION_FRACTION.value} is not in [0, 1).")
  if _VALIDATION_INPUT.value and _VALIDATION_FRACTION.value:
    raise UserError("Give --validation_input or --validation_fraction, not both.")
  if "://" in _OUTPUT.value:
    raise UserError(
      f"--output={_OUTPUT.value} is not a directory: mount the bucket, and name its path."
    )
  if os.path.exists(_OUTPUT.value):
    raise UserError(f"{_OUTPUT.value} exists already: delete it, or name another --output.")
  if _TRAIN_TOKENIZER_VOCAB.value and os.path.exists(_TOKENIZER.value):
    raise UserError(
      f"{_TOKENIZER.value} exists already: leave --train_tokenizer_vocab out to use it, or name "
      "another --tokenizer."
    )
  if share != shards.ALL and _TRAIN_TOKENIZER_VOCAB.value:
    raise UserError(
      "--train_tokenizer_vocab trains on the whole input: make the tokenizer first, and leave the "
      "flag out where --num_shards is given."
    )
  source = _open(_SOURCE.value)
  _refuse_idle_flags(source)
  to_document = _to_document(source)
  inputs = [source]
  if _VALIDATION_INPUT.value:
    inputs.append(_open_held_out(source))
  split = prepare.by_fraction(_VALIDATION_FRACTION.value)
  if _TRAIN_TOKENIZER_VOCAB.value:
    trained_on = (record for record in source if split(record) == TRAIN)
    texts = prepare.training_texts(trained_on, to_document, _TOKENIZER.value)
    train_sentencepiece(texts, _TOKENIZER.value, _TRAIN_TOKENIZER_VOCAB.value)
  tokenizer = load_tokenizer(_TOKENIZER.value)
  splits = [split, lambda record: VALIDATION]
  parts = DatasetParts(_OUTPUT.value, Vocabulary(tokenizer), _settings(inputs))
  count = prepare.add_parts(
    parts,
    zip(inputs, splits),
    lambda writer, records, split: prepare.add_documents(
      writer, records, tokenizer, to_document, split
    ),
    _RECORDS_PER_PART.value,
    share.is_mine,
  )

  def join() -> None:
    parts.join(count)
    _print_summary(Dataset(_OUTPUT.value), inputs)

  return join


def main(argv: list[str]) -> None:
  del argv
  # File names may contain bytes that are not UTF-8.
  sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
  share = _SHARDS.share()
  join = work(share or shards.ALL)
  if share:
    share.print_complete()
  else:
    join()


def _settings(inputs: list[sources.Source]) -> dict[str, Any]:
  """What decides which records become which documents."""
  chosen = (_FIELDS, _FIELDS_FROM, _CHAT_FIELD, _IDS_FIELD, _TEXT_FEATURE)
  others = (_VALIDATION_FRACTION, _RECORDS_PER_PART, _SUBSAMPLE_FRAMES, _SEED)
  return {
    "input": [source.identity() for source in inputs],
    **{flag.name: flag.value for flag in (*chosen, *others)},
  }


def _print_summary(dataset: Dataset, inputs: list[sources.Source]) -> None:
  dataset_summary.print_splits(dataset)
  if not dataset.has_split(VALIDATION):
    print("validation: no documents, so no held-out loss")
  for source in inputs:
    if source.left_out:
      kinds = ", ".join(f"{kind} {count}" for kind, count in source.left_out.most_common())
      print(f"{source.name}: {source.left_out.total():,} files were left out: {kinds}")
  dataset_summary.print_bad_records(dataset, "records")


if __name__ == "__main__":
  experiment_flags.run(main)
