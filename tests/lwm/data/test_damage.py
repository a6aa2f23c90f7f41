"""Damaged shards of a dataset: one sentence that names the file and the record, wherever it is."""

import pathlib
import shutil

import pytest

from lwm.data import Dataset, DatasetWriter, Loader, writer
from lwm.errors import UserError


@pytest.fixture(scope="module")
def sharded(tokenizer, documents, tmp_path_factory) -> pathlib.Path:
  """The text dataset, in files of 8 records; each document is one record."""
  path = tmp_path_factory.mktemp("sharded") / "text"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(writer, "_RECORDS_PER_FILE", 8)
    with DatasetWriter(path, tokenizer) as dataset:
      for document in documents["text"]:
        dataset.write("train", document)
  return path


@pytest.fixture
def dataset(sharded, tmp_path) -> pathlib.Path:
  return shutil.copytree(sharded, tmp_path / "text")


def shard(dataset: pathlib.Path, index: int) -> pathlib.Path:
  return sorted(dataset.glob("tokens-train.array_record-*"))[index]


def flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  # The records of so small a file are at its beginning.
  content[1000] ^= 1
  path.write_bytes(content)


def truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: pathlib.Path) -> None:
  path.write_bytes(b"")


def swap(path: pathlib.Path) -> None:
  shutil.copy(path.with_name(path.name.replace("00002", "00001")), path)


@pytest.mark.parametrize("damage", (flip, truncate, empty, swap, pathlib.Path.unlink))
def test_names_file_and_record(dataset, damage):
  path = shard(dataset, 2)
  damage(path)
  split = Dataset(dataset).split("train")
  with pytest.raises(UserError) as error:
    for document in range(len(split)):
      split.read(document, 0, 1)
  message = str(error.value)
  assert message.startswith("Record ") and f" of {path} cannot be read (" in message
  assert "\n" not in message and "to resume" in message
  # Documents of other files are read as ever.
  assert 16 <= document < 24
  assert message.startswith(f"Record {document - 16} ")
  split.read(15, 0, 1), split.read(24, 0, 1)


@pytest.mark.parametrize("damage", (truncate, empty, pathlib.Path.unlink))
@pytest.mark.parametrize(
  "name",
  (
    "train_lengths.npy",
    "train_targets.npy",
    "train_target_runs.npy",
    "dataset_info.json",
    "features.json",
  ),
)
def test_a_damaged_index_is_named(dataset, name, damage):
  damage(dataset / name)
  with pytest.raises(UserError) as error:
    Dataset(dataset).split("train")
  message = str(error.value)
  assert message.startswith(f"{dataset}/") and name in message.partition(" cannot be read (")[0]
  assert "\n" not in message and message.endswith("or prepare the dataset again.")


def test_reaches_the_loop_through_the_threads_that_read_ahead(dataset, experiment, make_mesh):
  experiment.datasets[0].path = str(dataset)
  experiment.stages[0].mixture = experiment.stages[0].mixture[:1]
  shard(dataset, 2).unlink()
  with pytest.raises(UserError, match="Record . of .*-00002.* cannot be read"):
    list(Loader(experiment, 0, make_mesh()).iterate())


def test_a_file_is_no_dataset(tmp_path):
  (tmp_path / "book.txt").write_text("the fox")
  with pytest.raises(UserError, match="no prepared dataset at .*book.txt"):
    Dataset(tmp_path / "book.txt")
