"""What a command that makes a dataset prints at its end."""

from lwm.data.dataset import Dataset
from lwm.data.frames import FrameDataset


def print_splits(dataset: Dataset) -> None:
  """Prints a line for each split: its documents, tokens, and unigram entropy by modality."""
  for name, split in dataset.manifest["splits"].items():
    entropy = ", ".join(f"{m} {nats:.3f}" for m, nats in split["unigram_entropy"].items())
    print(
      f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
      f"unigram entropy {entropy} nats"
    )


def print_bad_records(dataset: Dataset | FrameDataset, noun: str) -> None:
  """Prints how many records (or films, as `noun` says) were skipped, and where the dataset is."""
  bad_records = dataset.manifest["bad_records"]
  report = f" (see {dataset.path / 'bad_records.jsonl'})" if bad_records else ""
  print(f"{bad_records:,} bad {noun}{report}; dataset: {dataset.path}")
