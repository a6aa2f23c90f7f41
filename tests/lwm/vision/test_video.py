"""Video files to frames."""

import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from lwm.errors import UserError
from lwm.vision.video import FrameClock, crop_and_resize, read_clip, read_frames

RATE = 10


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """Two seconds of 96 x 64 pixels: grey that grows by 10 per frame, left edge red, right blue."""
  path = tmp_path_factory.mktemp("video") / "clip.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg4", rate=RATE)
    stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
    stream.bit_rate = 4_000_000
    for i in range(2 * RATE):
      pixels = np.full((64, 96, 3), 10 * i, np.uint8)
      pixels[:, :16] = (255, 0, 0)
      pixels[:, -16:] = (0, 0, 255)
      for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
        container.mux(packet)
    for packet in stream.encode():
      container.mux(packet)
  return path


def test_every_frame_in_order(clip):
  frames = read_clip(clip, 32)
  assert frames.shape == (20, 32, 32, 3) and frames.dtype == np.uint8
  np.testing.assert_allclose(frames.mean((1, 2, 3)), np.arange(20) * 10, atol=6)


def test_frames_per_second(clip):
  def greys(rate):
    return np.round(read_clip(clip, 32, rate).mean((1, 2, 3)) / 10).tolist()

  assert greys(5) == list(range(0, 20, 2))
  assert greys(2.5) == list(range(0, 20, 4))
  # Multiples of a quarter of a second: the first frame at or after each.
  assert greys(4) == [0, 3, 5, 8, 10, 13, 15, 18]
  assert greys(100) == list(range(20))


def test_frames_per_second_after_a_pause(tmp_path):
  path = tmp_path / "pause.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg4", rate=RATE)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    for number, tenths in enumerate([0, 1, 2, 3, 4, 20, 21, 22]):
      pixels = np.full((64, 64, 3), 20 * number, np.uint8)
      frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
      frame.pts, frame.time_base = tenths, Fraction(1, RATE)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  # The frame at 2.0 s stands for all fifths of a second of the pause, the one at 2.1 s for none.
  greys = np.round(read_clip(path, 32, 5).mean((1, 2, 3)) / 20).tolist()
  assert greys == [0, 2, 4, 5, 7]


def write_greys(path, codec: str, greys, **options):
  """One frame of each grey level, ten a second; `options` go to `add_stream`."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=RATE, **options)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    for grey in greys:
      pixels = np.full((64, 64, 3), grey, np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode())


def read_greys(path, frames_per_second=None) -> list[int]:
  return np.round(read_clip(path, 32, frames_per_second).mean((1, 2, 3)) / 10).tolist()


def test_two_transport_streams_joined_are_one_film(tmp_path):
  write_greys(tmp_path / "first.ts", "libx264", range(0, 100, 5))
  write_greys(tmp_path / "second.ts", "libx264", range(100, 200, 5))
  path = tmp_path / "joined.ts"
  path.write_bytes((tmp_path / "first.ts").read_bytes() + (tmp_path / "second.ts").read_bytes())
  # What makes this film hard: it does not begin at 0, and its time goes back.
  with av.open(str(path)) as container:
    times = [frame.time for frame in container.decode(video=0)]
  assert len(times) == 40 and times[0] == times[20] > 0
  assert len(read_clip(path, 32)) == 40
  assert read_greys(path, 5) == list(range(20))


def test_transport_stream_whose_time_stamps_wrap_around(tmp_path):
  path = tmp_path / "wrap.ts"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg2video", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    for number in range(50):
      pixels = np.full((64, 64, 3), 4 * number, np.uint8)
      frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
      frame.pts, frame.time_base = 2**33 // 3600 - 25 + number, Fraction(1, 25)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  assert read_greys(path, 5) == list(range(0, 20, 2))


def test_film_without_time_stamps_is_read_at_its_rate(tmp_path):
  path = tmp_path / "raw.h264"
  write_greys(path, "libx264", range(0, 200, 10))
  with av.open(str(path)) as container:
    assert next(container.decode(video=0)).time is None
  assert read_greys(path) == list(range(20))
  assert read_greys(path, 5) == list(range(0, 20, 2))


def test_film_whose_time_stamps_are_in_the_order_of_decoding(tmp_path):
  path = tmp_path / "disorder.avi"
  write_greys(path, "libx264", range(0, 200, 10), options={"bf": "3"})
  with av.open(str(path)) as container:
    times = [frame.time for frame in container.decode(video=0)]
  assert times != sorted(times)
  assert read_greys(path) == list(range(20))
  # Once the clock has reached the time stamps that are ahead, every second frame.
  greys = read_greys(path, 5)
  assert greys[0] == 0 and set(np.diff(greys[2:])) == {2}


def shown(stamps, period=0.5):
  clock = FrameClock(period)
  return [clock.advance(stamp) for stamp in stamps]


def test_frame_clock_starts_at_zero_and_follows_time_stamps():
  assert shown([7.0, 7.25, 9.0, 60.0]) == [0.0, 0.25, 2.0, 53.0]


def test_frame_clock_fills_in_missing_and_repeated_time_stamps():
  assert shown([None, None, 3.0, None, 4.0]) == [0.0, 0.5, 1.0, 1.5, 2.0]
  assert shown([0.0, 0.5, 0.5, 1.5, 2.0]) == [0.0, 0.5, 1.0, 1.5, 2.0]
  assert shown([0.0] * 6) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def test_frame_clock_continues_where_time_goes_back():
  # A swapped pair changes nothing after it; a jump far back starts a film after the first.
  assert shown([0.0, 1.0, 0.5, 1.5, 2.0]) == [0.0, 1.0, 1.5, 2.0, 2.5]
  assert shown([8.0, 8.5, 1.0, 1.5, 2.75]) == [0.0, 0.5, 1.0, 1.5, 2.75]


def test_the_square_is_cut_where_asked(clip):
  image = next(read_frames(clip))
  left, centre, right = (crop_and_resize(image, 64, position) for position in (0.0, 0.5, 1.0))
  assert left[32, 4, 0] > 200 and left[32, 60, 2] < 60
  assert centre.max() < 60
  assert right[32, 60, 2] > 200 and right[32, 4, 0] < 60


def test_tall_images_are_cut_from_top_to_bottom():
  pixels = np.zeros((40, 20, 3), np.uint8)
  pixels[:20] = 200
  image = Image.fromarray(pixels)
  # The filter reaches over the edge, by two rows.
  assert (crop_and_resize(image, 8, 0.0)[:-2] == 200).all()
  assert (crop_and_resize(image, 8, 1.0)[2:] == 0).all()


def test_centred_squares_are_those_of_lwm():
  rng = np.random.default_rng(0)
  for width, height in ((64, 48), (101, 37), (33, 250), (48, 48), (20, 31)):
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    # LWM's `_process_frame` (lwm/vision_chat.py) scales the whole image, then crops.
    size = (32, int(32 * height / width)) if width < height else (int(32 * width / height), 32)
    left, top = ((side - 32) / 2 for side in size)
    expected = image.resize(size).crop((left, top, left + 32, top + 32))
    # The positions of pixels are rounded to float32.
    np.testing.assert_allclose(crop_and_resize(image, 32), np.asarray(expected, int), atol=1)


def test_unreadable_files_end_in_one_sentence(clip, tmp_path):
  with pytest.raises(UserError, match="no video file .*none.mp4"):
    read_clip(tmp_path / "none.mp4", 32)
  text = tmp_path / "notes.mp4"
  text.write_text("not a video")
  with pytest.raises(UserError, match="notes.mp4 cannot be read as a video"):
    read_clip(text, 32)
  with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
    sound.setparams((1, 2, 8000, 0, "NONE", ""))
    sound.writeframes(bytes(16000))
  with pytest.raises(UserError, match="sound.wav has no video stream"):
    read_clip(tmp_path / "sound.wav", 32)
  unknown = tmp_path / "unknown.avi"
  write_greys(unknown, "mpeg4", range(3))
  unknown.write_bytes(unknown.read_bytes().replace(b"FMP4", b"QQQQ"))
  with pytest.raises(UserError, match="unknown.avi has video that FFmpeg cannot decode"):
    read_clip(unknown, 32)
  for rate in (0, -1, float("inf"), float("nan")):
    with pytest.raises(UserError, match=f"frames_per_second={rate}"):
      read_clip(clip, 32, rate)
