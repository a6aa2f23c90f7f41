"""`experiments.tokenize_video`, `prepare_beam` and `show_data`, as a user calls them."""

import concurrent.futures
import json
import pathlib
import socket
import time

import numpy as np
import pytest
from PIL import Image

from lwm.data import train_sentencepiece
from lwm.vision.codec import Codec
from lwm.vision.pictures import peak_signal_to_noise
from lwm.vision.video import read_clip, read_frames
from tests import programs
from tests.experiments.killed_films import files, unfinished
from tests.lwm import films


def run(*arguments: object) -> str:
  process = programs.run(*arguments)
  assert process.returncode == 0, process.stderr
  return process.stdout


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


@pytest.fixture(scope="module")
def models(folder) -> list[str]:
  return [f"--vqgan={folder}/vqgan.npz", f"--tokenizer={folder}/tokenizer.model"]


@pytest.fixture(scope="module")
def flags(folder, models) -> list[str]:
  return [*models, f"--input={folder}/films", "--films_per_part=1", "--decoders=1"]


@pytest.fixture(scope="module")
def dataset(folder, flags) -> pathlib.Path:
  """What the plain command makes."""
  output = run("experiments.tokenize_video", *flags, f"--output={folder}/dataset")
  assert "train: 4 documents" in output and "1 bad films" in output
  return folder / "dataset"


@pytest.mark.slow
def test_a_killed_command_continues(dataset, flags, tmp_path):
  killed = tmp_path / "killed"
  arguments = ["experiments.tokenize_video", *flags, f"--output={killed}"]
  for parts in (0, 2):
    process = programs.start(*arguments)
    while len(list(tmp_path.glob(".killed.unfinished/part-??????"))) < parts:
      assert process.poll() is None
      time.sleep(0.01)
    process.kill()
    process.wait()
    assert not killed.exists()
  run(*arguments)
  assert files(killed) == files(dataset)
  assert not unfinished(killed)


@pytest.mark.slow
def test_the_processes_of_one_job_share_the_work(dataset, flags, tmp_path):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  job = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--output={tmp_path}/shared"]
  with concurrent.futures.ThreadPoolExecutor() as threads:
    outputs = list(
      threads.map(
        lambda rank: run("experiments.tokenize_video", *flags, *job, f"--process_id={rank}"),
        range(2),
      )
    )
  # Five parts in turn; process 0 makes the dataset.
  assert [output.count("part ") for output in outputs] == [3, 2]
  assert ["dataset:" in output for output in outputs] == [True, False]
  assert files(tmp_path / "shared") == files(dataset)


@pytest.mark.slow
def test_beam_makes_the_dataset_of_the_plain_command(dataset, flags, folder, tmp_path):
  """Run it in an environment with Beam: see pins_beam.txt."""
  pytest.importorskip("apache_beam")
  beam = ["experiments.prepare_beam", "tokenize_video", "--num_shards=2"]
  output = run(*beam, *flags, f"--output={tmp_path}/films", "--", "--runner=DirectRunner")
  assert "train: 4 documents" in output
  assert files(tmp_path / "films") == files(dataset)

  lines = [{"question": f"what is {n}", "answer": f"it is {n}"} for n in range(50)]
  lines[7] = {"question": "half a record"}
  (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  text = [f"--input={tmp_path}/chat.jsonl", f"--tokenizer={folder}/tokenizer.model"]
  text += ["--fields=[question],answer", "--records_per_part=8", "--validation_fraction=0.2"]
  run("experiments.prepare_data", *text, f"--output={tmp_path}/plain")
  beam[1] = "prepare_data"
  run(*beam, *text, f"--output={tmp_path}/beam")
  assert files(tmp_path / "beam") == files(tmp_path / "plain")

  missing = programs.run(*beam, *text, f"--input={tmp_path}/none", f"--output={tmp_path}/beam2")
  assert missing.returncode == 1
  assert f"error: There is no input {tmp_path}/none." in missing.stderr.splitlines()[-1]


@pytest.mark.slow
def test_shown_frames_are_the_reconstruction_of_the_films(dataset, models, folder, tmp_path):
  shown = tmp_path / "shown"
  show = [f"--dataset={dataset}", f"--output={shown}", "--sequence_length=2048"]
  output = run("experiments.show_data", *models, *show)
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
    clip = read_clip(shown / f"{document}-0.mp4", codec.config.resolution)
    assert len(clip) == len(decoded) and peak_signal_to_noise(decoded, clip) > 15
    assert f"{document}-0.mp4" in page

  # The same beside the source, without a dataset.
  sheets = tmp_path / "sheets"
  vqgan, _ = models
  output = run(
    "experiments.reconstruct", vqgan, f"--input={folder}/films", f"--output={sheets}"
  ).splitlines()
  side = codec.config.resolution
  assert f"3.mp4: {len(frames)} frames, PSNR " in output[3]
  decibels = float(output[3].partition("PSNR ")[2].split()[0])
  assert decibels == pytest.approx(peak_signal_to_noise(frames, decoded), abs=0.05)
  assert "notes.txt: left out: " in output[4]
  sheet = np.asarray(Image.open(sheets / "3-3.png"), int)
  np.testing.assert_array_equal(sheet[:side, :side], frames[0])
  np.testing.assert_allclose(sheet[-side:, :side], decoded[0], atol=1)
  both = list(read_frames(sheets / "3-3.mp4"))
  assert len(both) == len(frames) and both[0].size == (side, 2 * side)
