"""Films to datasets: the same bytes whatever is interrupted, and whoever shares the work."""

import json
import pathlib

import jax
import numpy as np
import pytest

from lwm.data import Dataset, frame_codes
from lwm.data.film_documents import FilmDocuments, RowSettings
from lwm.data.film_job import FilmJob
from lwm.data.film_throughput import throughput
from lwm.data.films import digest, read_films
from lwm.data.parts import Vocabulary
from lwm.data.writer import DatasetParts
from lwm.errors import UserError
from lwm.vision.codec import Codec
from lwm.vision.decoders import Decoders, settings
from lwm.vision.frame_encoder import FrameEncoder
from lwm.vision.video import read_clip
from tests.lwm import films

RATE = 8
FILMS_PER_PART = 3


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Codec:
  return Codec(films.write_vqgan(tmp_path_factory.mktemp("vqgan") / "vqgan.npz"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("films")
  lines = []
  for seed in range(7):
    path = films.write_film(folder / f"{seed}.mp4", 5 + 4 * seed, seed)
    lines.append({"path": path.name, "captions": [f"film {seed}", "a film"]})
  lines[2] |= {"start": 0.5, "end": 1.5}
  turns = [("user", "What is this?"), ("assistant", "A film."), ("user", "Really?")]
  lines[4] = {"path": "4.mp4", "turns": [{"role": role, "content": text} for role, text in turns]}
  lines.insert(1, {"path": "missing.mp4"})
  lines.insert(5, {"caption": "without a path"})
  manifest = folder / "films.jsonl"
  manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return manifest


@pytest.fixture
def job(codec, manifest, tokenizer, tmp_path):
  """Makes a job that writes to `name`; `run` takes what may differ between runs."""

  class Job:
    def __init__(self, name: str):
      entries = read_films(manifest)
      self.path = tmp_path / name
      self.count = -(-len(entries) // FILMS_PER_PART)
      vocabulary = Vocabulary(tokenizer, codec.sha256, codec.config.layout, chunk_tokens=500)
      self.parts = DatasetParts(self.path, vocabulary, {"input": digest(entries)})
      documents = FilmDocuments(tokenizer, codec.config.layout, RowSettings())
      self._job = FilmJob(entries, FILMS_PER_PART, self.parts, documents, validation_fraction=0.4)

    def missing(self) -> list[int]:
      return [number for number in range(self.count) if not self.parts.is_complete(number)]

    def run(self, numbers=None, processes=1, devices=1, frames_per_device=4, report=None):
      numbers = self.missing() if numbers is None else numbers
      encoder = FrameEncoder(codec, jax.devices()[:devices], frames_per_device)
      decoding = settings(codec.config.resolution, RATE, max_frames=1000, timeout=60)
      with Decoders(processes, decoding._replace(frames_per_buffer=3)) as decoders:
        self._job.run(numbers, decoders, encoder, report or (lambda part: None))
      return self

    def join(self) -> dict[str, bytes]:
      self.parts.join(self.count)
      return {file.name: file.read_bytes() for file in self.path.iterdir()}

  return Job


@pytest.fixture
def undisturbed(job) -> dict[str, bytes]:
  return job("undisturbed").run().join()


@pytest.mark.slow
def test_documents_hold_the_codes_of_the_films(job, codec, manifest, tokenizer):
  made = job("whole").run()
  made.join()
  dataset = Dataset(made.path)
  bad = [json.loads(line) for line in (made.path / "bad_records.jsonl").read_text().splitlines()]
  for line, record in zip((2, 6), bad, strict=True):
    assert f"films.jsonl:{line}" in record["where"]
  assert "There is no video file" in bad[0]["reason"]
  assert bad[1]["reason"].startswith("field 'caption' is unknown")
  assert dataset.manifest["bad_records"] == len(bad) == 2

  entries = [film for film in read_films(manifest) if film.path.endswith(".mp4")]
  found = []
  for name in ("train", "validation"):
    split = dataset.split(name)
    for document in range(len(split)):
      tokens, loss_mask = split.read(document, 0, int(split.lengths[document]))
      is_vision = tokens >= tokenizer.vocab_size
      codes = frame_codes(tokens[is_vision] - tokenizer.vocab_size, codec.config.layout)
      found.append((codes.tolist(), tokenizer.decode(tokens[~is_vision].tolist())))
      assert split.targets[document].sum() == loss_mask[1:].sum()
      is_dialogue = "USER" in found[-1][1]
      assert loss_mask[is_vision].all() != is_dialogue
  for film in entries:
    if "missing" in film.path:
      continue
    frames = read_clip(film.path, codec.config.resolution)
    if film.end is not None:
      frames = frames[round(film.start * RATE) : round(film.end * RATE)]
    codes = codec.encode(frames).reshape(len(frames), -1).tolist()
    [text] = [text for other, text in found if other == codes]
    if film.turns is None:
      assert any(caption in text for caption in film.captions)
    else:
      assert "USER: <vision></vision>\nWhat is this?" in text and "A film." in text


@pytest.mark.slow
def test_shared_work_gives_the_same_bytes(job, undisturbed):
  shared = job("shared")
  numbers = shared.missing()
  assert len(numbers) == 3
  job("shared").run(numbers[1::2], processes=2, devices=8, frames_per_device=2)
  job("shared").run(numbers[0::2], frames_per_device=4)
  assert shared.missing() == []
  assert shared.join() == undisturbed
  assert [file.name for file in shared.path.parent.iterdir() if file.name.startswith(".")] == []


@pytest.mark.slow
def test_interrupted_work_gives_the_same_bytes(job, undisturbed):
  class Killed(Exception):
    pass

  def kill(part):
    raise Killed

  interruptions = 0
  while job("again").missing():
    try:
      job("again").run(report=kill)
    except Killed:
      interruptions += 1
  assert interruptions == 3
  assert job("again").join() == undisturbed


@pytest.mark.slow
def test_a_killed_join_continues(job, undisturbed, monkeypatch):
  made = job("again").run()

  def fail(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(np, "save", fail)
    with pytest.raises(KeyboardInterrupt):
      made.parts.join(made.count)
  assert job("again").join() == undisturbed


def test_other_settings_are_refused(job, manifest, codec, tokenizer):
  begun = job("begun").run([0])
  vocabulary = Vocabulary(tokenizer, codec.sha256, codec.config.layout, chunk_tokens=500)
  with pytest.raises(UserError, match="was begun with input=.*, and now it is other"):
    DatasetParts(begun.path, vocabulary, {"input": "other"})


def test_throughput_of_each_stage_and_of_both(codec, manifest, tmp_path):
  encoder = FrameEncoder(codec, jax.devices()[:1], frames_per_device=4)
  decoding = settings(codec.config.resolution, RATE, max_frames=1000, timeout=60)
  entries = read_films(manifest)
  rates = dict(throughput(entries, lambda: Decoders(1, decoding), encoder, seconds=0.1))
  assert list(rates) == ["decoding", "encoding", "decoding and encoding"]
  (tmp_path / "text.mp4").write_text("not a film")
  with pytest.raises(UserError, match="No film has a frame"):
    list(throughput(read_films(tmp_path), lambda: Decoders(1, decoding), encoder, seconds=0.1))
