"""Documents longer than a row: what is kept, how it counts, and what is said of the rest."""

import collections
import json
import pathlib
import shutil

import numpy as np
import pytest

from lwm.config.batch import FIELDS
from lwm.config.experiment import LONG_DOCUMENTS, DatasetConfig, MixtureEntry
from lwm.data import Dataset, DatasetWriter, Document, Loader, text_document
from lwm.data.coverage import coverage
from lwm.data.packing import pack
from lwm.data.rows import Rows
from lwm.errors import UserError

S = 64


@pytest.fixture(scope="module")
def masked(tokenizer, tmp_path_factory) -> tuple[pathlib.Path, list[Document]]:
  """Text and vision ids in documents of many lengths, most of whose tokens do not count."""
  path = tmp_path_factory.mktemp("masked") / "masked"
  rng = np.random.default_rng(0)
  documents = []
  for length in (2, 3, 63, 64, 65, 66, 128, 129, *rng.integers(2, 400, 40)):
    tokens = rng.integers(0, tokenizer.vocab_size + 100, length)
    loss_mask = np.repeat(rng.random(length // 16 + 1) < 0.15, 16)[:length]
    # At the first token, the mask means nothing.
    loss_mask[rng.integers(1, length)] = loss_mask[0] = True
    documents.append(Document(tokens.astype(np.int32), loss_mask))
  with DatasetWriter(path, tokenizer, chunk_tokens=50) as writer:
    for document in documents:
      writer.write("train", document)
  return path, documents


@pytest.fixture
def older(masked, tmp_path) -> pathlib.Path:
  """The same dataset as an older version prepared it."""
  path = shutil.copytree(masked[0], tmp_path / "older")
  (path / "train_target_runs.npy").unlink()
  manifest = json.loads((path / "manifest.json").read_text())
  del manifest["splits"]["train"]["target_runs"]
  (path / "manifest.json").write_text(json.dumps(manifest))
  return path


def make_rows(path, length=S, **settings) -> Rows:
  dataset = Dataset(path)
  config = DatasetConfig(**settings)
  return Rows(dataset.split("train"), dataset.text_vocab_size, length, config, seed=0)


def read(rows: Rows) -> list[dict[str, np.ndarray]]:
  """Every row, whole."""
  length = rows.plan.sequence_length
  read = []
  for row in range(len(rows)):
    read.append({name: np.zeros(length, dtype) for name, dtype in FIELDS.items()})
    rows.read(row, [(0, length)], read[-1])
  return read


def slices(rows: Rows) -> collections.Counter:
  """How often the rows hold each slice: its tokens, targets and weights."""
  found = collections.Counter()
  for row in read(rows):
    is_token = row["key_stop"] > 0
    for start in np.unique(row["key_start"][is_token]):
      own = is_token & (row["key_start"] == start)
      np.testing.assert_array_equal(row["positions"][own], np.arange(own.sum()))
      names = ("tokens", "targets", "loss_weights")
      found[tuple(tuple(row[name][own].tolist()) for name in names)] += 1
  return found


def test_runs_count_the_targets_of_any_slice(masked, tokenizer):
  path, documents = masked
  runs = Dataset(path).split("train").target_runs
  rng = np.random.default_rng(1)
  document = rng.integers(0, len(documents), 500)
  lengths = np.array([len(documents[d].tokens) for d in document])
  start = rng.integers(0, lengths + 1)
  stop = rng.integers(start, lengths + 2)
  expected = []
  for d, first, last in zip(document, start, stop):
    tokens, mask = documents[d]
    inside = np.arange(len(tokens))
    counts = mask & (inside > 0) & (inside >= first) & (inside < last)
    is_vision = tokens >= tokenizer.vocab_size
    expected.append([(counts & ~is_vision).sum(), (counts & is_vision).sum()])
  np.testing.assert_array_equal(runs.count(document, start, stop), expected)


@pytest.mark.parametrize("length", (16, S))
@pytest.mark.parametrize("policy", LONG_DOCUMENTS)
def test_rows_without_targets_are_known_before_they_are_read(masked, length, policy):
  rows = make_rows(masked[0], length, long_documents=policy)
  holds = [bool(row["loss_weights"].any()) for row in read(rows)]
  np.testing.assert_array_equal(rows.hold_targets(), holds)
  # Only a document that is not whole has no target.
  assert all(holds) == (policy == "leave_out")


def weighted(document: Document, weights_2, text_vocab_size: int):
  """The slice of a row that is this document, by definition."""
  tokens, mask = document
  weights = np.where(tokens >= text_vocab_size, *weights_2[::-1]) * mask
  weights = np.append(weights[1:], 0).astype(np.float32)
  targets = np.append(tokens[1:], 0)
  return tuple(tokens.tolist()), tuple(targets.tolist()), tuple(weights.tolist())


@pytest.mark.parametrize("weighting", ("token", "example"))
@pytest.mark.parametrize("policy", ("leave_out", "keep_end"))
def test_what_is_kept_is_as_if_nothing_else_had_been(masked, tokenizer, policy, weighting):
  path, documents = masked
  if policy == "leave_out":
    documents = [d for d in documents if len(d.tokens) <= S]
  documents = [Document(tokens[-S:], mask[-S:].copy()) for tokens, mask in documents]
  for document in documents:
    document.loss_mask[0] = False
  is_vision = [d.tokens >= tokenizer.vocab_size for d in documents]
  targets = np.array(
    [[(d.loss_mask & ~v).sum(), (d.loss_mask & v).sum()] for d, v in zip(documents, is_vision)]
  )
  mean_2 = targets.sum(0) / (targets > 0).sum(0)
  rows = make_rows(path, long_documents=policy, weighting=weighting)
  found = slices(rows)
  expected = collections.Counter()
  for document, targets_2 in zip(documents, targets):
    weights_2 = mean_2 / np.maximum(targets_2, 1) if weighting == "example" else (1, 1)
    expected[weighted(document, weights_2, tokenizer.vocab_size)] += 1
  assert found == expected
  weights = sum(sum(weights) * count for (_, _, weights), count in found.items())
  np.testing.assert_allclose(weights, targets.sum(), rtol=1e-5)


def test_what_is_dropped_is_told(masked):
  path, documents = masked
  lengths = np.array([len(d.tokens) for d in documents])
  long = int((lengths > S).sum())
  targets = sum(int(d.loss_mask[1:].sum()) for d in documents)
  lines = {}
  for policy in LONG_DOCUMENTS:
    rows = make_rows(path, long_documents=policy)
    lines[policy] = coverage(rows, np.arange(len(rows)), policy)
    told = f"documents longer than a row of 64 tokens: {long} of {len(documents)} ("
    assert lines[policy].startswith(told + f"long_documents={policy!r})")
    empty = sum(not row["loss_weights"].any() for row in read(rows))
    share = f" ({empty / len(rows):.1%})" if empty else ""
    assert f"; rows without a target: {empty} of {len(rows)}{share}" in lines[policy]
  assert "dropped" not in lines["cut"] and lines["cut"].endswith("'leave_out' or 'keep_end'")
  left_out = [d for d in documents if len(d.tokens) > S]
  lost = sum(int(d.loss_mask[1:].sum()) for d in left_out)
  dropped = lengths[lengths > S].sum()
  assert (
    f"; dropped: {dropped:,} of {lengths.sum():,} tokens, {lost:,} of {targets:,} targets"
    in (lines["leave_out"])
  )
  lost = sum(int(d.loss_mask[1 : len(d.tokens) - S + 1].sum()) for d in left_out)
  dropped -= S * long
  assert (
    f"; dropped: {dropped:,} of {lengths.sum():,} tokens, {lost:,} of {targets:,} targets"
    in (lines["keep_end"])
  )
  rows = make_rows(path, 400, long_documents="keep_end")
  assert coverage(rows, np.arange(len(rows)), "keep_end") == (
    f"documents longer than a row of 400 tokens: 0 of {len(documents)}; rows without a target: 0 "
    f"of {len(rows)}"
  )


def test_a_dataset_of_an_older_version(masked, older):
  now, before = make_rows(masked[0]), make_rows(older)
  assert slices(now) == slices(before)
  assert f"rows without a target: unknown, because an older version prepared {older}" in coverage(
    before, np.arange(len(before)), "cut"
  )
  # No part of a document is in a row, so every row has a target.
  before = make_rows(older, long_documents="leave_out")
  assert "rows without a target: 0 of" in coverage(before, np.arange(len(before)), "leave_out")
  with pytest.raises(UserError, match=f"{older} was prepared by an older .*='keep_end'"):
    make_rows(older, long_documents="keep_end")
  assert slices(make_rows(older, 400, long_documents="keep_end")) == slices(make_rows(older, 400))


def test_a_plan_of_nothing_has_no_rows():
  assert pack(np.zeros(3, np.int64), S, seed=0).num_rows == 0


@pytest.fixture
def write(tokenizer, tmp_path):
  """Writes a dataset of (split, number of words, loss on the first tokens only) documents."""

  def write(name: str, *documents: tuple[str, int, bool]) -> str:
    with DatasetWriter(tmp_path / name, tokenizer) as writer:
      for split, words, only_first in documents:
        tokens, mask = text_document(tokenizer, " ".join(["fox"] * words))
        writer.write(
          split, Document(tokens, mask & (np.arange(len(mask)) < 4) if only_first else mask)
        )
    return str(tmp_path / name)

  return write


@pytest.mark.parametrize(
  "policy, only_first", (("leave_out", False), ("leave_out", True), ("keep_end", True))
)
def test_nothing_to_learn_is_an_error(experiment, make_mesh, write, policy, only_first):
  path = write("chat", *[("train", 90, only_first)] * 3)
  experiment.datasets.append(DatasetConfig("chat", path, long_documents=policy))
  experiment.stages[0].name = "first"
  experiment.stages[0].mixture.append(MixtureEntry("chat", 0.01))
  with pytest.raises(UserError) as error:
    Loader(experiment, 0, make_mesh())
  assert str(error.value) == (
    f"Stage 'first' would learn nothing from dataset 'chat' ({path}): 3 of 3 documents are longer "
    f"than its sequence_length=64, and config.datasets[2].long_documents={policy!r} keeps none of "
    "the targets; set another value, or a larger sequence_length."
  )
  experiment.datasets[2].long_documents = "cut"
  Loader(experiment, 0, make_mesh())


def test_targets_whose_loss_has_no_weight_are_an_error(experiment, make_mesh):
  experiment.loss.vision_weight = 0.0
  with pytest.raises(UserError, match="from dataset 'video' .* config.loss.vision_weight is 0;"):
    Loader(experiment, 0, make_mesh())
  experiment.stages[0].mixture.pop()
  Loader(experiment, 0, make_mesh())


def test_the_loader_reports_every_split_and_evaluates_what_has_targets(
  experiment, make_mesh, write
):
  path = write("chat", ("train", 5, False), ("train", 90, True), ("validation", 90, True))
  experiment.datasets = [DatasetConfig("chat", path)]
  experiment.stages[0].name = "first"
  experiment.stages[0].mixture = [MixtureEntry("chat")]

  loader = Loader(experiment, 0, make_mesh())
  train, held_out = loader.report()
  assert train.startswith("first, chat: documents longer than a row of 64 tokens: 1 of 2 (")
  assert held_out.startswith(
    "first, chat, held out: documents longer than a row of 64 tokens: 1 of"
  )
  assert "rows without a target: 5 of 6 (83.3%)" in held_out
  assert loader.evaluation_datasets == ["chat"]

  for policy in ("leave_out", "keep_end"):
    experiment.datasets[0].long_documents = policy
    loader = Loader(experiment, 0, make_mesh())
    assert loader.report()[1].endswith("; no held-out loss")
    assert loader.evaluation_datasets == []
