"""`experiments.tokenize_video` and `experiments.show_data`, as a user calls them."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from lwm.data import train_sentencepiece
from lwm.vision.codec import Codec
from lwm.vision.video import read_clip
from tests.lwm import films

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A folder with films, vqgan.npz and tokenizer.model."""
  folder = tmp_path_factory.mktemp("folder")
  (folder / "films").mkdir()
  for seed in range(4):
    films.write_film(folder / "films" / f"{seed}.mp4", 12 + seed, seed)
  (folder / "films" / "notes.txt").write_text("not a film")
  films.write_vqgan(folder / "vqgan.npz")
  train_sentencepiece(
    ["the quick brown fox jumps over a lazy dog"], folder / "tokenizer.model", 280
  )
  return folder


def start(program: str, folder: pathlib.Path, *flags: str) -> subprocess.Popen:
  environment = {
    name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PJRT_NPROC")
  }
  files = [f"--vqgan={folder}/vqgan.npz", f"--tokenizer={folder}/tokenizer.model"]
  return subprocess.Popen(
    [sys.executable, "-m", f"experiments.{program}", *files, *flags],
    cwd=ROOT,
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def run(program: str, folder: pathlib.Path, *flags: str) -> str:
  process = start(program, folder, *flags)
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  return output


def tokenize_flags(folder: pathlib.Path, output: pathlib.Path) -> list[str]:
  return [f"--input={folder}/films", f"--output={output}", "--films_per_part=1", "--decoders=1"]


@pytest.mark.slow
def test_from_films_to_the_frames_of_a_row(folder, tmp_path):
  output = run("tokenize_video", folder, *tokenize_flags(folder, tmp_path / "dataset"))
  assert "train: 4 documents" in output and "1 bad films" in output
  [bad] = (tmp_path / "dataset" / "bad_records.jsonl").read_text().splitlines()
  assert json.loads(bad)["where"].endswith("notes.txt") and json.loads(bad)["reason"]

  shown = tmp_path / "shown"
  flags = f"--dataset={tmp_path}/dataset", f"--output={shown}", "--sequence_length=2048"
  output = run("show_data", folder, *flags)
  page = (shown / "index.html").read_text()
  codec = Codec(folder / "vqgan.npz")
  for document in range(4):
    frames = read_clip(folder / "films" / f"{document}.mp4", codec.config.resolution, 4)
    decoded = codec.decode(codec.encode(frames))
    assert f"document {document}: tokens 0 to" in output
    for number, frame in enumerate(decoded):
      name = f"{document}-{number}.png"
      np.testing.assert_array_equal(np.asarray(Image.open(shown / name)), frame)
      assert name in page
    assert not (shown / f"{document}-{len(decoded)}.png").exists()


@pytest.mark.slow
def test_killed_at_random_moments(folder, tmp_path):
  run("tokenize_video", folder, *tokenize_flags(folder, tmp_path / "whole"))
  whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
  generator = random.Random(0)
  for _ in range(3):
    process = start("tokenize_video", folder, *tokenize_flags(folder, tmp_path / "killed"))
    time.sleep(generator.uniform(2, 8))
    process.send_signal(signal.SIGKILL)
    process.communicate()
  if not (tmp_path / "killed").exists():
    run("tokenize_video", folder, *tokenize_flags(folder, tmp_path / "killed"))
  killed = {file.name: file.read_bytes() for file in (tmp_path / "killed").iterdir()}
  assert killed == whole
