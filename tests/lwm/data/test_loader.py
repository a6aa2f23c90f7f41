import collections

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kernels.ring.layout import Layout
from lwm.config.batch import FIELDS
from lwm.config.experiment import DatasetConfig, MixtureEntry
from lwm.config.vqgan import LWM_LAYOUT, VisionLayout
from lwm.data import (
  Dataset,
  DatasetWriter,
  Loader,
  load_tokenizer,
  train_sentencepiece,
  video_document,
)
from lwm.data.dataset import Split
from lwm.errors import UserError

S = 64


def _host(batch, layout, ring=1):
  """Numpy, columns in the order of the sequence."""
  inverse = np.argsort(Layout(layout, ring).permutation(S))
  return {name: np.asarray(array)[:, inverse] for name, array in batch.items()}


def _starts(documents):
  """Where a slice that begins with these tokens can be: tokens -> (dataset, document, offset)."""
  places = collections.defaultdict(list)
  for name, docs in documents.items():
    for d, document in enumerate(docs):
      for offset in range(0, len(document.tokens), S):
        piece = tuple(document.tokens[offset : offset + S].tolist())
        places[piece].append((name, d, offset))
  return places


def _check_row(row, documents, places, text_vocab_size, weight_of, seen):
  """A row is slices of documents, each field as its definition says; counts them in `seen`."""
  is_token = row["key_stop"] > row["key_start"]
  at = 0
  for start in np.unique(row["key_start"][is_token]):
    columns = np.flatnonzero(is_token & (row["key_start"] == start))
    n = len(columns)
    np.testing.assert_array_equal(columns, np.arange(at, at + n))
    name, d, offset = places[tuple(row["tokens"][columns].tolist())][0]
    document = documents[name][d]
    seen[tuple(row["tokens"][columns].tolist())] += 1
    np.testing.assert_array_equal(row["positions"][columns], np.arange(n))
    np.testing.assert_array_equal(row["key_start"][columns], np.full(n, at))
    np.testing.assert_array_equal(row["key_stop"][columns], columns + 1)
    for i, column in enumerate(columns):
      following = offset + i + 1
      if following < len(document.tokens):
        target = document.tokens[following]
        modality = int(target >= text_vocab_size)
        weight = weight_of(name, d, modality) if document.loss_mask[following] else 0.0
      else:
        target, modality, weight = 0, 0, 0.0
      assert row["targets"][column] == target and row["modality"][column] == modality
      np.testing.assert_allclose(row["loss_weights"][column], weight, rtol=1e-6)
    at += n
  for name, array in row.items():
    assert not array[at:].any(), name


@pytest.mark.parametrize(
  "layout, sizes",
  [
    ("contiguous", {}),
    ("contiguous", {"fsdp": 2, "ring": 4}),
    ("zigzag", {"data": 2, "ring": 2, "tensor": 2}),
    ("zigzag", {"data": 2, "ring": 4}),
    ("zigzag", {"ring": 2, "ulysses": 4}),
  ],
)
@pytest.mark.parametrize("weighting", ["token", "example"])
def test_an_epoch_is_every_token_once_and_every_field_right(
  experiment, documents, make_mesh, tokenizer, layout, sizes, weighting
):
  stage = experiment.stages[0]
  stage.layout = layout
  documents = {"text": documents["text"]}
  stage.mixture = [MixtureEntry("text", 1.0)]
  experiment.datasets[0].weighting = weighting
  counts = np.array([d.loss_mask[1:].sum() for d in documents["text"]])

  def weight_of(name, d, modality):
    return 1.0 if weighting == "token" else counts.mean() / counts[d]

  loader = Loader(experiment, 0, make_mesh(**sizes))
  places = _starts(documents)
  seen = collections.Counter()
  num_rows, weights, epoch = 0, 0.0, None
  while epoch is None or num_rows < epoch:
    batch = _host(loader.batch(num_rows // 8), layout, sizes.get("ring", 1))
    epoch = epoch or len(loader._rows[0])
    for row in range(min(8, epoch - num_rows)):
      fields = {name: array[row] for name, array in batch.items()}
      _check_row(fields, documents, places, tokenizer.vocab_size, weight_of, seen)
      weights += fields["loss_weights"].sum()
    num_rows += 8
  assert seen == {piece: len(where) for piece, where in places.items()}
  # Either weighting sums to the number of targets that count.
  np.testing.assert_allclose(weights, counts.sum(), rtol=1e-5)


def test_example_weights_of_two_modalities(experiment, documents, make_mesh, tokenizer):
  experiment.datasets[1].weighting = "example"
  experiment.stages[0].mixture = [MixtureEntry("video", 1.0)]
  documents = {"video": documents["video"]}
  modality = [d.tokens[1:] >= tokenizer.vocab_size for d in documents["video"]]
  counts = np.array(
    [
      [(d.loss_mask[1:] & ~m).sum(), (d.loss_mask[1:] & m).sum()]
      for d, m in zip(documents["video"], modality)
    ]
  )
  loader = Loader(experiment, 0, make_mesh())
  places, seen = _starts(documents), collections.Counter()
  for step in range(3):
    batch = _host(loader.batch(step), "contiguous")
    for row in range(8):
      fields = {name: array[row] for name, array in batch.items()}
      _check_row(
        fields,
        documents,
        places,
        tokenizer.vocab_size,
        lambda name, d, m: counts[:, m].mean() / counts[d, m],
        seen,
      )
  assert len(seen) > 10


def test_batches_are_sharded_and_typed_as_training_expects(experiment, make_mesh):
  mesh = make_mesh(data=2, fsdp=2, ring=2)
  batch = Loader(experiment, 0, mesh).batch(0)
  assert set(batch) == set(FIELDS)
  for name, array in batch.items():
    assert array.shape == (8, S)
    assert array.dtype == (np.float32 if name == "loss_weights" else np.int32)
    spec = PartitionSpec(("data", "fsdp", "expert"), ("ring", "ulysses"))
    assert array.sharding == jax.NamedSharding(mesh, spec)


def _equal(a, b):
  return all(np.array_equal(a[name], b[name]) for name in a)


def test_the_stream_is_a_function_of_seed_stage_and_step(experiment, make_mesh):
  mesh = make_mesh(data=2)
  experiment.stages.append(experiment.stages[0])
  loader = Loader(experiment, 0, mesh)
  steps = list(loader.iterate())
  assert len(steps) == 10
  # Resuming anywhere goes on with the same batches, and so does asking out of order.
  resumed = list(Loader(experiment, 0, mesh).iterate(7))
  assert len(resumed) == 3
  assert all(_equal(a, b) for a, b in zip(steps[7:], resumed))
  assert _equal(loader.batch(2), steps[2]) and _equal(loader.batch(9), steps[9])
  assert not list(loader.iterate(10))
  assert not _equal(steps[0], steps[1])
  assert not _equal(Loader(experiment, 1, mesh).batch(0), steps[0])
  experiment.seed = 1
  assert not _equal(Loader(experiment, 0, mesh).batch(0), steps[0])


def test_the_mesh_does_not_change_the_stream(experiment, make_mesh):
  batches = []
  for layout, sizes in (("contiguous", {}), ("contiguous", {"ring": 8}), ("zigzag", {"ring": 4})):
    experiment.stages[0].layout = layout
    batch = Loader(experiment, 0, make_mesh(**sizes)).batch(4)
    batches.append(_host(batch, layout, sizes.get("ring", 1)))
  assert _equal(batches[0], batches[1]) and _equal(batches[0], batches[2])


def test_epochs_differ_in_order_only(experiment, make_mesh):
  experiment.stages[0].mixture = [MixtureEntry("video", 1.0)]
  experiment.stages[0].tokens_per_batch = S
  loader = Loader(experiment, 0, make_mesh())
  epoch = len(loader._rows[0])
  rows = [np.asarray(loader.batch(step)["tokens"])[0].tolist() for step in range(2 * epoch)]
  assert sorted(rows[:epoch]) == sorted(rows[epoch:])
  assert rows[:epoch] != rows[epoch:]


def test_mixture_proportions(experiment, make_mesh, tokenizer):
  stage = experiment.stages[0]
  stage.steps, stage.tokens_per_batch = 25, S * 16
  stage.mixture = [MixtureEntry("text", 0.3), MixtureEntry("video", 0.6), MixtureEntry("text", 0.1)]
  loader = Loader(experiment, 0, make_mesh())
  is_video = np.concatenate(
    [(np.asarray(batch["tokens"]) >= tokenizer.vocab_size).any(1) for batch in loader.iterate()]
  )
  assert abs(is_video.mean() - 0.6) < 0.01
  # Interleaved, not one after the other.
  assert 6 <= is_video[:16].sum() <= 12
  stage.mixture = [MixtureEntry("text", 1.0), MixtureEntry("video", 0.0)]
  assert list(Loader(experiment, 0, make_mesh()).datasets) == ["text"]


def test_evaluation_rows_are_fixed_and_padded(experiment, make_mesh):
  experiment.stages[0].accumulation_steps = 2
  experiment.datasets[0].weighting = "example"
  mesh = make_mesh(data=2, ring=2)
  loader = Loader(experiment, 0, mesh)
  assert loader.evaluation_datasets == ["text"]
  batches = [_host(b, "zigzag", 2) for b in loader.evaluation_batches("text")]
  validation = Dataset(experiment.datasets[0].path).split("validation")
  rows = len(batches) * 4
  used = np.concatenate([b["key_stop"].any(1) for b in batches])
  assert batches[0]["tokens"].shape == (4, S)
  # Fewer rows than asked for: all of them, each target counting 1, and empty rows at the end.
  assert used[: used.sum()].all() and rows - 4 < used.sum() < rows
  assert sum(b["loss_weights"].sum() for b in batches) == validation.targets.sum()
  for b in batches:
    assert not b["loss_weights"][b["key_stop"] == 0].any()

  experiment.seed = 3
  experiment.evaluation.rows = 2
  again = [_host(b, "zigzag", 2) for b in Loader(experiment, 0, mesh).evaluation_batches("text")]
  assert len(again) == 1
  np.testing.assert_array_equal(again[0]["tokens"][:2], batches[0]["tokens"][:2])
  assert not again[0]["tokens"][2:].any()
  with pytest.raises(UserError, match="no validation documents"):
    next(loader.evaluation_batches("video"))


def test_what_does_not_go_together_is_an_error(experiment, make_mesh, tmp_path):
  mesh = make_mesh()
  experiment.model.text_vocab_size -= 1
  with pytest.raises(UserError, match="has 290 text ids, but config.model.text_vocab_size is 289"):
    Loader(experiment, 0, mesh)
  experiment.model.text_vocab_size += 1
  right, experiment.model.vision_vocab_size = experiment.model.vision_vocab_size, 0
  with pytest.raises(UserError, match="vision_vocab_size is 0"):
    Loader(experiment, 0, mesh)
  experiment.model.vision_vocab_size = right
  other = VisionLayout(64, LWM_LAYOUT.end_of_frame)
  tokenizer = load_tokenizer(experiment.tokenizer)
  with DatasetWriter(tmp_path / "small", tokenizer, layout=other) as writer:
    writer.write("train", video_document(tokenizer, np.zeros((1, 64), int), layout=other))
  experiment.datasets.append(DatasetConfig("small", str(tmp_path / "small")))
  experiment.stages[0].mixture.append(MixtureEntry("small"))
  with pytest.raises(UserError, match="video and .*small have different layouts.*=64.*one VQGAN"):
    Loader(experiment, 0, mesh)
  experiment.stages[0].mixture.pop()
  train_sentencepiece(["other"], tmp_path / "other.model", 270)
  right, experiment.tokenizer = experiment.tokenizer, str(tmp_path / "other.model")
  with pytest.raises(UserError, match="prepared with tokenizer") as error:
    Loader(experiment, 0, mesh)
  assert right in str(error.value) and experiment.tokenizer in str(error.value)


def test_vision_ids_follow_the_text_ids_of_the_model(experiment, make_mesh):
  """A model may have more text ids than its tokenizer, as Qwen's have; their rows are unused."""
  mesh = make_mesh()
  expected = Loader(experiment, 0, mesh).batch(0)
  experiment.model.text_vocab_size += 7
  batch = Loader(experiment, 0, mesh).batch(0)
  assert set(batch) == set(expected) and (batch["modality"] == 1).any()
  for name, array in batch.items():
    moved = 7 * (expected[name] >= 290) if name in ("tokens", "targets") else 0
    np.testing.assert_array_equal(array, expected[name] + moved)


def test_each_document_is_read_once_for_all_local_devices(experiment, make_mesh, monkeypatch):
  read = []
  plain_read = Split.read

  def counting_read(self, document, start, stop):
    read.append(stop - start)
    return plain_read(self, document, start, stop)

  monkeypatch.setattr(Split, "read", counting_read)
  amounts = []
  for sizes in ({}, {"ring": 8}, {"data": 2, "ring": 2, "tensor": 2}):
    read.clear()
    Loader(experiment, 0, make_mesh(**sizes)).batch(0)
    amounts.append(sum(read))
  assert amounts[0] == amounts[1] == amounts[2]
