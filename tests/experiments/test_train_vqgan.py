"""`python -m experiments.train_vqgan`, as a user runs it."""

import subprocess

import av
import numpy as np
import pytest
from PIL import Image

from lwm.vision.codec import Codec
from tests import programs

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


def run(*arguments: str) -> subprocess.CompletedProcess:
  return programs.run("experiments.train_vqgan", *arguments)


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
  command = [f"--video={clip}", f"--output={output}", *TINY]
  ended = run(*command)
  assert ended.returncode == 0, ended.stderr
  assert f"held-out {clip}: PSNR" in ended.stdout
  assert Codec(output).config.resolution == 32
  assert output.with_suffix(".png").is_file()

  ended = run(*command)
  assert ended.returncode == 1
  assert ended.stderr.strip().endswith("exists already: delete it, or name another --output.")


def test_a_rotated_film_and_two_joined_transport_streams(tmp_path):
  """The picture shows held-out frames: upright, and from the film whose time stamps go back."""

  def write(name, codec, top, bottom, turn=False):
    with av.open(str(tmp_path / name), "w") as container:
      stream = container.add_stream(codec, rate=10)
      stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
      if turn:
        stream.set_display_rotation(90)
      pixels = np.full((48, 64, 3), bottom, np.uint8)
      # The right half is at the top once the film is turned counterclockwise.
      pixels[:, 32:] = top
      for _ in range(20):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
      container.mux(stream.encode())
    return tmp_path / name

  turned = write("turned.mp4", "mpeg4", 200, 40, turn=True)
  first, second = (
    write("first.ts", "mpeg2video", 60, 60),
    write("second.ts", "mpeg2video", 180, 180),
  )
  joined = tmp_path / "joined.ts"
  joined.write_bytes(first.read_bytes() + second.read_bytes())
  output = tmp_path / "vqgan.npz"
  films = [f"--video={turned}", f"--video={joined}", "--frames_per_second=5", "--held_out=0.5"]
  ended = run(*films, f"--output={output}", *TINY)
  assert ended.returncode == 0, ended.stderr
  with Image.open(output.with_suffix(".png")) as image:
    picture = np.asarray(image.convert("L"))
  # Rows of 32 pixels, twice their size, 4 apart: a film, its reconstruction, the other film.
  upper, lower, other = picture[4:24, :60], picture[40:60, :60], picture[140:200]
  np.testing.assert_allclose([upper.mean(), lower.mean()], [200, 40], atol=8)
  # All held-out frames are of the second stream: its 10 frames, of 20, were not lost.
  assert other[:, :60].mean() == pytest.approx(180, abs=8)
  assert other[:, 340:400].mean() == pytest.approx(180, abs=8)


def test_a_codebook_of_several_blocks(clip, tmp_path):
  output = tmp_path / "vqgan.npz"
  settings = ["--vqgan.resolution=64", "--vqgan.codebook_size=1500", "--training.batch_size=25"]
  command = [f"--video={clip}", f"--output={output}"]
  ended = run(*command, *TINY, *settings)
  assert ended.returncode == 0, ended.stderr
  assert Codec(output).config.codebook_size == 1500


def test_a_codebook_that_the_frames_cannot_fill_is_said_before_training(clip, tmp_path):
  output = tmp_path / "vqgan.npz"
  command = [f"--video={clip}", f"--output={output}"]
  ended = run(*command, *TINY, "--vqgan.codebook_size=16384")
  assert ended.returncode == 1 and not ended.stdout
  assert ended.stderr == (
    "error: codebook_size=16384 needs at least 256 frames of 64 codes to train on, but there are "
    "17: give more video or a smaller codebook_size.\n"
  )


def test_a_file_that_is_not_a_video_and_steps_that_do_not_fit(clip, tmp_path):
  notes = tmp_path / "notes.txt"
  notes.write_text("hello")
  output = tmp_path / "vqgan.npz"
  ended = run(f"--video={notes}", f"--output={output}")
  assert ended.returncode == 1 and "notes.txt cannot be read as a video" in ended.stderr
  assert "Traceback" not in ended.stderr
  ended = run(f"--video={clip}", f"--output={output}", "--training.steps=100")
  assert ended.returncode == 1 and "continuous_steps=200 is not in [0, steps)" in ended.stderr


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--vqgan.codbook_size=9", "has no setting 'codbook_size'; did you mean 'codebook_size'?"),
    ("--vqgan.codebook_size=x", "--vqgan.codebook_size=x must be a whole number."),
    ("--vqgan=9", "--vqgan=9: --vqgan is a group of settings; set one of them."),
    ("--training.batch_size=0", "--training: batch_size=0 must be at least 1."),
    ("--vqgan.codebook_size=0", "--vqgan: codebook_size=0: sizes are whole numbers of at least 1."),
  ],
)
def test_a_wrong_setting_is_one_sentence(tmp_path, flag, message):
  output = f"--output={tmp_path / 'vqgan.npz'}"
  ended = run("--video=x", output, flag)
  assert ended.returncode == 1
  assert ended.stderr.startswith("error: ") and ended.stderr.endswith(f"{message}\n")
  assert ended.stderr.count("\n") == 1
