"""Datasets of frames: from films to batches."""

import jax
import numpy as np
import pytest

from lwm.config.experiment import (
  EvaluationConfig,
  FrameDatasetConfig,
  MixtureEntry,
  VQGANExperiment,
  VQGANStage,
)
from lwm.config.vqgan import VQGANConfig
from lwm.data.films import read_films
from lwm.data.frame_job import FrameJob
from lwm.data.frame_loader import FrameLoader
from lwm.data.frame_parts import FrameParts
from lwm.data.frames import FrameDataset
from lwm.errors import UserError
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.vision import decoders
from tests.lwm.films import write_film

SIDE = 8


def make(films, path, numbers=(0, 1)):
  """Makes parts of two films each; returns their numbers of frames."""
  parts = FrameParts(path, SIDE, {})
  made = []
  with decoders.Decoders(2, decoders.settings(SIDE, 8.0, 100, 30.0)) as pool:
    pending = [number for number in numbers if not parts.is_complete(number)]
    FrameJob(read_films(films), 2, parts, 0.25).run(pending, pool, made.append)
  return parts, {part.number: (part.films, part.bad_films, part.frames) for part in made}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
  folder = tmp_path_factory.mktemp("films")
  write_film(folder / "a.mp4", 12)
  write_film(folder / "b.mp4", 8, seed=1)
  (folder / "c.mp4").write_text("no film")
  write_film(folder / "d.mp4", 5, seed=2)
  return folder


@pytest.fixture(scope="module")
def dataset(films, tmp_path_factory):
  parts, made = make(films, tmp_path_factory.mktemp("data") / "frames")
  assert made == {0: (2, 0, 20), 1: (2, 1, 5)}
  parts.join(2)
  return FrameDataset(parts.path)


def test_the_last_part_of_each_film_is_held_out(dataset, films):
  assert [dataset.num_frames(split) for split in ("train", "validation")] == [9 + 6 + 4, 3 + 2 + 1]
  bad = (dataset.path / "bad_records.jsonl").read_text()
  assert bad.count("\n") == dataset.manifest["bad_records"] == 1 and "c.mp4" in bad
  frame = dataset.read("validation", 5)
  assert frame.shape == (SIDE, SIDE, 3) and frame.dtype == np.uint8


def test_a_killed_job_makes_only_the_rest_and_the_same_bytes(dataset, films, tmp_path):
  make(films, tmp_path / "again", numbers=[1])
  parts, made = make(films, tmp_path / "again")
  assert list(made) == [0]
  parts.join(2)
  for path in dataset.path.iterdir():
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_damaged_record_is_named(dataset, films, tmp_path):
  parts, _ = make(films, tmp_path / "damaged")
  parts.join(2)
  (file,) = (tmp_path / "damaged").glob("*train*00001")
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(UserError, match="Record 2 of .*frames-train.array_record-00001 cannot be"):
    FrameDataset(tmp_path / "damaged").read("train", 17)


def experiment_on(dataset):
  return VQGANExperiment(
    vqgan=VQGANConfig(resolution=SIDE),
    datasets=[FrameDatasetConfig("films", str(dataset.path))],
    stages=[VQGANStage("only", 8, steps=6, mixture=[MixtureEntry("films")])],
    evaluation=EvaluationConfig(rows=12),
  )


def test_batches_are_the_same_on_any_mesh_and_from_any_step(dataset):
  experiment = experiment_on(dataset)
  one = FrameLoader(experiment, 0, make_mesh(MeshConfig(), jax.devices()[:1]))
  eight = FrameLoader(experiment, 0, make_mesh(MeshConfig(data=2, fsdp=4)))
  batches = [np.asarray(batch["frames"]) for batch in one.iterate()]
  assert len(batches) == 6
  for step, batch in enumerate(eight.iterate(2), start=2):
    np.testing.assert_array_equal(batch["frames"], batches[step])
    assert batch["frames"].addressable_shards[0].data.shape == (1, SIDE, SIDE, 3)
  np.testing.assert_array_equal(one.batch(3)["frames"], batches[3])

  # 48 frames are two epochs and a half of 19: each comes two or three times, some mirrored.
  stored = [dataset.read("train", index) for index in range(19)]
  seen = np.concatenate(batches)
  plain = [sum(np.array_equal(frame, other) for other in seen) for frame in stored]
  mirrored = [sum(np.array_equal(frame[:, ::-1], other) for other in seen) for frame in stored]
  assert {a + b for a, b in zip(plain, mirrored)} == {2, 3}
  assert 10 < sum(mirrored) < 38


def test_a_process_reads_the_frames_of_its_own_devices(dataset, monkeypatch):
  """As in a run of two processes, of which this one has the first or the last four devices."""
  experiment, mesh = experiment_on(dataset), make_mesh(MeshConfig(data=2, fsdp=4))
  whole = FrameLoader(experiment, 0, mesh)
  rows = whole._batches[0]
  assert sorted(rows) == [(row, row + 1) for row in range(8)]
  of_all = jax.sharding.NamedSharding.addressable_devices_indices_map
  for own in (mesh.devices.flat[:4], mesh.devices.flat[4:]):
    with monkeypatch.context() as patch:
      patch.setattr(
        jax.sharding.NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {d: i for d, i in of_all(self, shape).items() if d in own},
      )
      part = FrameLoader(experiment, 0, mesh)
    reads = []
    read = FrameDataset.read
    monkeypatch.setattr(FrameDataset, "read", lambda *a: (reads.append(a), read(*a))[1])
    mine = part._batches[0]
    monkeypatch.undo()
    assert len(reads) == len(mine) == 4
    for place, frames in mine.items():
      np.testing.assert_array_equal(frames, rows[place])


def test_held_out_frames_are_fixed_and_fill_whole_batches(dataset):
  loader = FrameLoader(experiment_on(dataset), 0, make_mesh(MeshConfig(), jax.devices()[:1]))
  assert loader.evaluation_datasets == ["films"]
  batches = [np.asarray(batch["frames"]) for batch in loader.evaluation_batches("films")]
  assert len(batches) == 2
  frames = np.concatenate(batches)
  np.testing.assert_array_equal(frames[:6], frames[6:12])
  stored = {dataset.read("validation", index).tobytes() for index in range(6)}
  assert {frame.tobytes() for frame in frames} == stored
