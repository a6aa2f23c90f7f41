"""`python -m experiments.train_vqgan`, as a person runs it."""

import pathlib
import subprocess
import sys

import av
import numpy as np
import pytest

from lwm.vision.codec import Codec

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
  "--vqgan.resolution=32",
  "--vqgan.hidden_channels=8",
  "--vqgan.codebook_size=16",
  "--vqgan.norm_groups=4",
  "--training.steps=4",
  "--training.warmup_steps=1",
  "--training.continuous_steps=2",
  "--training.batch_size=2",
]


def run(arguments: list[str]) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def clip(tmp_path):
  path = tmp_path / "clip.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg4", rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for i in range(20):
      frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * i, np.uint8), format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


@pytest.mark.slow
def test_trains_on_a_clip_and_overwrites_nothing(clip, tmp_path):
  output = tmp_path / "out" / "vqgan.npz"
  command = ["-m", "experiments.train_vqgan", f"--video={clip}", f"--output={output}", *TINY]
  ended = run(command)
  assert ended.returncode == 0, ended.stderr
  assert f"held-out {clip}: PSNR" in ended.stdout
  assert Codec(output).config.resolution == 32
  assert output.with_suffix(".png").is_file()

  ended = run(command)
  assert ended.returncode == 1
  assert ended.stderr.strip().endswith("exists already: delete it, or name another --output.")


def test_a_file_that_is_no_video_and_sizes_that_do_not_fit(clip, tmp_path):
  notes = tmp_path / "notes.txt"
  notes.write_text("hello")
  output = tmp_path / "vqgan.npz"
  ended = run(["-m", "experiments.train_vqgan", f"--video={notes}", f"--output={output}"])
  assert ended.returncode == 1 and "notes.txt cannot be read as a video" in ended.stderr
  assert "Traceback" not in ended.stderr
  ended = run(
    [
      "-m",
      "experiments.train_vqgan",
      f"--video={clip}",
      f"--output={output}",
      "--training.steps=100",
    ]
  )
  assert ended.returncode == 1 and "continuous_steps=200 is not in [0, steps)" in ended.stderr


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--vqgan.codbook_size=9", "has no setting 'codbook_size'; did you mean 'codebook_size'?"),
    ("--vqgan.codebook_size=x", "--vqgan.codebook_size=x: this setting takes a whole number."),
    ("--vqgan=9", "--vqgan=9: --vqgan is a group of settings; override one of them."),
    ("--training.batch_size=0", "--training: batch_size=0 must be at least 1."),
  ],
)
def test_a_wrong_setting_is_one_sentence(tmp_path, flag, message):
  output = f"--output={tmp_path / 'vqgan.npz'}"
  ended = run(["-m", "experiments.train_vqgan", "--video=x", output, flag])
  assert ended.returncode == 1
  assert ended.stderr.startswith("error: ") and ended.stderr.endswith(f"{message}\n")
  assert ended.stderr.count("\n") == 1
