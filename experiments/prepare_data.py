"""Tokenises raw documents into a dataset that training reads.

    python -m experiments.prepare_data --source=text --input=books/ --suffix=.txt \\
        --tokenizer=tokenizer.model --train_tokenizer_vocab=4096 --output=data/books
    python -m experiments.prepare_data --source=jsonl --input=chat.jsonl \\
        --fields='[instruction],output' --tokenizer=tokenizer.json --output=data/chat
    python -m experiments.prepare_data --source=tfds --input=lm1b --text_feature=text \\
        --tokenizer=tokenizer.model --output=data/lm1b

The output is written in full or not at all; records that were skipped are named, with the reason,
in its bad_records.jsonl. lwm/data/documents.py says what --fields means, lwm/data/dataset.py what
the output holds.
"""

import functools
import os
from collections.abc import Iterator

from absl import flags

from experiments import flags as experiment_flags
from lwm.data import prepare, sources
from lwm.data.dataset import TRAIN, VALIDATION, Dataset
from lwm.data.tokenizer import load_tokenizer, train_sentencepiece
from lwm.data.writer import DatasetWriter
from lwm.errors import UserError

_SOURCE = flags.DEFINE_enum("source", None, ["text", "jsonl", "tfds"], "Kind of input.")
_INPUT = flags.DEFINE_string("input", None, "File, folder, or name of a TFDS dataset.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "A *.model or tokenizer.json file.")
_TRAIN_TOKENIZER_VOCAB = flags.DEFINE_integer(
  "train_tokenizer_vocab", None, "Train a tokenizer of this size on the input, into --tokenizer."
)
_SUFFIX = flags.DEFINE_string("suffix", None, "Of the files to take from a folder [.txt, .jsonl].")
_FIELDS = flags.DEFINE_multi_string(
  "fields", [], "jsonl: LWM's fields specification; given several times, each record takes one."
)
_FIELDS_FROM = flags.DEFINE_string(
  "fields_from", "fields", "jsonl, without --fields: the record's field that holds it."
)
_TEXT_FEATURE = flags.DEFINE_string("text_feature", "text", "tfds: the feature to take.")
_TFDS_SPLIT = flags.DEFINE_string("tfds_split", "train", "tfds: the split to take.")
_TFDS_DATA_DIR = flags.DEFINE_string("tfds_data_dir", None, "tfds: where it keeps datasets.")
_VALIDATION_INPUT = flags.DEFINE_string(
  "validation_input", None, "File or folder of held-out documents (tfds: a split)."
)
_VALIDATION_FRACTION = flags.DEFINE_float(
  "validation_fraction", 0.0, "Share of --input's documents to hold out, chosen by hash."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the choice among several --fields.")
flags.mark_flags_as_required(["source", "input", "output", "tokenizer"])


def _records(held_out: bool = False) -> Iterator[sources.Record]:
  if _SOURCE.value == "tfds":
    split = _VALIDATION_INPUT.value if held_out else _TFDS_SPLIT.value
    return sources.tfds_records(_INPUT.value, split, _TEXT_FEATURE.value, _TFDS_DATA_DIR.value)
  path = _VALIDATION_INPUT.value if held_out else _INPUT.value
  if _SOURCE.value == "jsonl":
    return sources.jsonl_files(path, _SUFFIX.value or ".jsonl")
  return sources.text_files(path, _SUFFIX.value or ".txt")


def main(argv: list[str]) -> None:
  del argv
  if not 0 <= _VALIDATION_FRACTION.value < 1:
    raise UserError(f"--validation_fraction={_VALIDATION_FRACTION.value} is not in [0, 1).")
  if _VALIDATION_INPUT.value and _VALIDATION_FRACTION.value:
    raise UserError("Give --validation_input or --validation_fraction, not both.")
  if "://" in _OUTPUT.value:
    raise UserError(f"--output={_OUTPUT.value} is no directory: name one where it is mounted.")
  if os.path.exists(_OUTPUT.value):
    raise UserError(f"{_OUTPUT.value} exists already: delete it, or name another --output.")

  if _TRAIN_TOKENIZER_VOCAB.value:
    if os.path.exists(_TOKENIZER.value):
      raise UserError(
        f"{_TOKENIZER.value} exists already: leave --train_tokenizer_vocab out to use it, or "
        "name another --tokenizer."
      )
    corpus = prepare.texts(_records(), _FIELDS_FROM.value)
    train_sentencepiece(corpus, _TOKENIZER.value, _TRAIN_TOKENIZER_VOCAB.value)
  tokenizer = load_tokenizer(_TOKENIZER.value)
  to_document = prepare.from_text
  if _SOURCE.value == "jsonl":
    to_document = prepare.from_fields(_FIELDS.value, _FIELDS_FROM.value, _SEED.value)

  with DatasetWriter(_OUTPUT.value, tokenizer) as writer:
    add = functools.partial(
      prepare.add_documents, writer, tokenizer=tokenizer, to_document=to_document
    )
    add(_records(), split=prepare.by_fraction(_VALIDATION_FRACTION.value))
    if _VALIDATION_INPUT.value:
      add(_records(held_out=True), split=lambda record: VALIDATION)
    if TRAIN not in writer.splits:
      raise UserError(
        f"--validation_fraction={_VALIDATION_FRACTION.value} holds out every document: lower it."
      )
  _print_summary(Dataset(_OUTPUT.value))


def _print_summary(dataset: Dataset) -> None:
  for name, split in dataset.manifest["splits"].items():
    entropy = ", ".join(f"{m} {nats:.3f}" for m, nats in split["unigram_entropy"].items())
    print(
      f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
      f"unigram entropy {entropy} nats"
    )
  if not dataset.has_split(VALIDATION):
    print("validation: no documents, so no held-out loss")
  bad_records = dataset.manifest["bad_records"]
  report = f" (see {dataset.path / 'bad_records.jsonl'})" if bad_records else ""
  print(f"{bad_records:,} bad records{report}; dataset: {dataset.path}")


if __name__ == "__main__":
  experiment_flags.run(main)
