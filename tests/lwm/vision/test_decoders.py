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
DECODING = settings(SIDE, frames_per_second=8, max_frames=100, timeout=2)


def decode(clips, processes=1, decoding=DECODING) -> list[tuple[np.ndarray, str]]:
  """The frames of each clip, and its problem."""
  frames = [[np.zeros((0, SIDE, SIDE, 3), np.uint8)] for _ in clips]
  problems = [""] * len(clips)
  ended = set()
  with Decoders(processes, decoding) as decoders:
    for event in decoders.decode(enumerate(clips)):
      if event.frames_NxHxWx3 is not None:
        assert event.index not in ended
        frames[event.index].append(event.frames_NxHxWx3.copy())
      else:
        problems[event.index] = event.problem
        ended.add(event.index)
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


def test_a_part_of_a_film(folder):
  path = str(folder / "4.mp4")
  whole = read_clip(path, SIDE)
  [(part, problem), (_, empty)] = decode([Clip(path, 1.0, 2.5), Clip(path, 100.0)])
  assert not problem
  np.testing.assert_array_equal(part, whole[8:20])
  assert "no frames between 100.0 s and None s" in empty


def test_hostile_files_are_named_and_the_next_film_is_decoded(tmp_path, folder):
  good = str(folder / "0.mp4")
  text = tmp_path / "text.mp4"
  text.write_text("not a film\n" * 100)
  (tmp_path / "empty.mp4").touch()
  os.mkfifo(tmp_path / "hangs.mp4")
  cases = {
    films.write_truncated(tmp_path / "truncated.mp4", 0.5): "cannot be read as a video",
    films.write_truncated(tmp_path / "truncated.avi", 0.5): "ends after",
    films.write_truncated(tmp_path / "truncated.mkv", 0.5): "ends after",
    films.write_sound(tmp_path / "sound.wav"): "has no video stream",
    films.write_huge_image(tmp_path / "huge.png"): "cannot be read as a video",
    films.write_film(tmp_path / "nothing.mp4", 0): "has no video stream",
    text: "cannot be read as a video",
    tmp_path / "empty.mp4": "cannot be read as a video",
    tmp_path / "missing.mp4": "There is no video file",
    tmp_path: "cannot be read as a video",
    tmp_path / "hangs.mp4": "the decoder hangs: no frame for 2 s",
    films.start_endless(tmp_path / "endless.ts"): "more than 100 frames",
  }
  clips = [clip for path in cases for clip in (Clip(str(path)), Clip(good))]
  results = decode(clips, 2)
  for (path, reason), (_, problem) in zip(cases.items(), results[::2]):
    assert problem and reason in problem, (path, problem)
  for frames, problem in results[1::2]:
    assert not problem and len(frames) == 10


def test_a_crash_is_a_problem_of_one_film(tmp_path, folder):
  os.mkfifo(tmp_path / "waits")
  clips = [Clip(str(tmp_path / "waits")), Clip(str(folder / "0.mp4"))]
  problems = []
  with Decoders(1, DECODING._replace(timeout=60)) as decoders:
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
