"""Films decoded in processes of their own, and what becomes of films that are broken."""

import os
import pathlib
import signal

import numpy as np
import pytest
from PIL import Image

from lwm.vision.decoder_process import Clip
from lwm.vision.decoders import Decoders, settings
from lwm.vision.video import read_clip
from tests.lwm import films

SIDE = 32
DECODING = settings(SIDE, frames_per_second=8, max_frames=100, timeout=60)


def decode(clips, processes=1, decoding=DECODING) -> list[tuple[np.ndarray, str]]:
  """The frames of each clip, and its problem."""
  frames = [[np.zeros((0, SIDE, SIDE, 3), np.uint8)] for _ in clips]
  problems = [""] * len(clips)
  ended = set()
  with Decoders(processes, decoding) as decoders:
    for event in decoders.decode(enumerate(clips)):
      if event.frames_NxHxWx3 is not None:
        assert event.film not in ended
        frames[event.film].append(event.frames_NxHxWx3.copy())
      else:
        problems[event.film] = event.problem
        ended.add(event.film)
  assert ended == set(range(len(clips)))
  return list(zip(map(np.concatenate, frames), problems))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("films")
  for seed in range(5):
    films.write_film(folder / f"{seed}.mp4", 10 + 5 * seed, seed)
  return folder


def test_frames_are_those_of_the_film_in_order(folder):
  paths = sorted(map(str, folder.iterdir()))
  # Two frames per buffer: buffers are used many times.
  small = DECODING._replace(frames_per_buffer=2)
  for path, (frames, problem) in zip(paths, decode(list(map(Clip, paths)), 2, small)):
    assert not problem
    np.testing.assert_array_equal(frames, read_clip(path, SIDE, 8))


def test_a_part_of_a_film(tmp_path):
  # Frames refer to later ones, and no keyframe is where the part begins.
  for suffix in (".mp4", ".mkv", ".ts"):
    path = films.write_film(tmp_path / f"long{suffix}", 80, codec="libx264")
    whole = read_clip(path, SIDE)
    clips = [Clip(str(path), start, start + 1.5) for start in (0.0, 1.0, 6.0, 7.5)]
    for clip, (part, problem) in zip(clips, decode(clips)):
      assert not problem
      first = round(clip.start * 8)
      np.testing.assert_array_equal(part, whole[first : first + 12])
  [(_, problem)] = decode([Clip(str(path), 100.0)])
  assert "no frames between 100.0 s and None s" in problem


def hostile_files(folder: pathlib.Path) -> dict[pathlib.Path, str]:
  """Files that are no film, each with a part of the reason that must be reported."""
  cases = {}
  # The index of an MP4 is at its end, or at its beginning with faststart.
  faststart = {"options": {"movflags": "faststart"}}
  reasons = {".mkv": "ends after", ".ts": "is cut off after"}
  for suffix, options in (
    *((".mp4", {}), ("-.mp4", faststart), (".avi", {}), (".mkv", {})),
    *((".flv", {"codec": "flv"}), (".ts", {"codec": "mpeg2video"})),
  ):
    content = films.write_film(folder / f"whole{suffix}", 64, **options).read_bytes()
    (folder / f"whole{suffix}").unlink()
    for percent in (1, 5, 10, 20, 30, 40, 50, 60):
      path = folder / f"{percent}{suffix}"
      # An odd number of bytes is no whole number of a transport stream's packets.
      path.write_bytes(content[: len(content) * percent // 100 | 1])
      cases[path] = reasons.get(suffix, "") if percent > 10 else ""
  for suffix in (".mp4", ".mov", ".mkv", ".avi", ".ts"):
    cases[films.write_film(folder / f"no-frames{suffix}", 0)] = ""
    cases[folder / f"empty{suffix}"] = "cannot be read as a video"
    (folder / f"empty{suffix}").touch()
    cases[folder / f"text{suffix}"] = "cannot be read as a video"
    (folder / f"text{suffix}").write_text("not a film\n" * 100)
    cases[films.write_sound(folder / f"sound{suffix}")] = "has no video stream"
  for suffix in (".png", ".gif", ".jpg", ".webp", ".bmp"):
    path = folder / f"half{suffix}"
    Image.fromarray(films.frames(1)[0]).save(path)
    path.write_bytes(path.read_bytes()[:20])
    cases[path] = ""
  (folder / "notes.txt").write_text("FFmpeg would draw these characters.\n" * 100)
  (folder / "folder.mp4").mkdir()
  (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
  os.mkfifo(folder / "hangs.mp4")
  os.mkfifo(folder / "hangs.png")
  return cases | {
    films.write_huge_image(folder / "huge.png"): "cannot be read as a video",
    folder / "notes.txt": "has no video stream",
    folder / "missing.mp4": "There is no video file",
    folder / "folder.mp4": "cannot be read as a video (Is a directory)",
    folder / "loop.mp4": "symbolic links",
    folder / "hangs.mp4": "the decoder hangs: no frame for 5 s",
    folder / "hangs.png": "the decoder hangs: no frame for 5 s",
    films.start_endless(folder / "endless.ts"): "more than 100 frames",
  }


@pytest.mark.slow
def test_hostile_files_are_named_and_the_next_film_is_decoded(tmp_path, folder):
  good = str(folder / "0.mp4")
  cases = hostile_files(tmp_path)
  assert len(cases) >= 60
  clips = [clip for path in cases for clip in (Clip(str(path)), Clip(good))]
  results = decode(clips, 3, DECODING._replace(timeout=5))
  wrong = {
    path.name: (reason, problem)
    for (path, reason), (_, problem) in zip(cases.items(), results[::2])
    if not problem or reason not in problem
  }
  assert not wrong
  for frames, problem in results[1::2]:
    assert not problem and len(frames) == 10


def test_damaged_bytes_end_nothing(tmp_path, folder):
  """FFmpeg decodes most damaged films anyway."""
  generator = np.random.default_rng(0)
  clips = []
  for number in range(20):
    content = bytearray((folder / "4.mp4").read_bytes())
    for place in generator.integers(0, len(content), 2 ** (number % 10)):
      content[place] = generator.integers(256)
    path = tmp_path / f"{number}.mp4"
    path.write_bytes(content)
    clips += [Clip(str(path)), Clip(str(folder / "0.mp4"))]
  for frames, problem in decode(clips, 2)[1::2]:
    assert not problem and len(frames) == 10


def test_a_crash_is_a_problem_of_one_film(tmp_path, folder):
  os.mkfifo(tmp_path / "waits")
  clips = [Clip(str(tmp_path / "waits")), Clip(str(folder / "0.mp4"))]
  problems = []
  with Decoders(1, DECODING) as decoders:
    [decoder] = decoders._processes

    def clips_and_crash():
      yield 0, clips[0]
      yield 1, clips[1]

    start = decoder.start

    def start_and_crash(clip):
      start(clip)
      if clip is clips[0]:
        decoder._process.send_signal(signal.SIGSEGV)

    decoder.start = start_and_crash
    for event in decoders.decode(clips_and_crash()):
      if event.frames_NxHxWx3 is None:
        problems.append(event.problem)
  assert problems == ["the decoder crashed: Segmentation fault", ""]


def test_odd_sizes_and_images(tmp_path):
  films.write_film(tmp_path / "odd.avi", 5, size=(34, 98))
  Image.fromarray(films.frames(1, size=(31, 77))[0]).save(tmp_path / "image.png")
  [(film, _), (image, problem)] = decode(
    [Clip(str(tmp_path / "odd.avi")), Clip(str(tmp_path / "image.png"))]
  )
  assert film.shape == (5, SIDE, SIDE, 3) and image.shape == (1, SIDE, SIDE, 3) and not problem
