"""`experiments.tokenize_video` and `experiments.show_data`, as a user calls them."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from lwm.data import train_sentencepiece
from lwm.vision.codec import Codec
from lwm.vision.video import read_clip
from tests.experiments.killed_films import files, kill, run, unfinished
from tests.lwm import films


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A folder with films, vqgan.npz and tokenizer.model."""
  folder = tmp_path_factory.mktemp("folder")
  (folder / "films").mkdir()
  for seed in range(4):
    films.write_film(folder / "films" / f"{seed}.mp4", 12 + seed, seed)
  (folder / "films" / "notes.txt").write_text("not a film")
  films.write_vqgan(folder / "vqgan.npz")
  train_sentencepiece(["the quick brown fox jumps over it"], folder / "tokenizer.model", 290)
  return folder


@pytest.mark.slow
def test_killed_then_shown(folder, tmp_path):
  models = [f"--vqgan={folder}/vqgan.npz", f"--tokenizer={folder}/tokenizer.model"]
  dataset = tmp_path / "dataset"
  tokenize = ["experiments.tokenize_video", *models, f"--input={folder}/films"]
  tokenize += ["--films_per_part=1", "--decoders=1"]
  output = run(*tokenize, f"--output={dataset}")
  assert "train: 4 documents" in output and "1 bad films" in output
  [bad] = (dataset / "bad_records.jsonl").read_text().splitlines()
  assert json.loads(bad)["where"].endswith("notes.txt") and json.loads(bad)["reason"]

  killed = tmp_path / "killed"
  kill([*tokenize, f"--output={killed}"], killed, kills=2, seconds=8)
  assert files(killed) == files(dataset)
  assert not unfinished(killed)

  shown = tmp_path / "shown"
  flags = [f"--dataset={dataset}", f"--output={shown}", "--sequence_length=2048"]
  output = run("experiments.show_data", *models, *flags)
  page = (shown / "index.html").read_text()
  codec = Codec(folder / "vqgan.npz")
  for document in range(4):
    frames = read_clip(folder / "films" / f"{document}.mp4", codec.config.resolution, 4)
    decoded = codec.decode(codec.encode(frames))
    assert f"document {document}: tokens 0 to" in output
    for number, frame in enumerate(decoded):
      name = f"{document}-{number}.png"
      # The programs are compiled apart, so a pixel may be rounded to the next level.
      np.testing.assert_allclose(np.asarray(Image.open(shown / name), int), frame, atol=1)
      assert name in page
    assert not (shown / f"{document}-{len(decoded)}.png").exists()
