"""Video files to frames."""

import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from lwm.errors import UserError
from lwm.vision.video import crop_and_resize, read_clip, read_frames

RATE = 10


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """Two seconds of 96 x 64 pixels: grey that grows by 10 a frame, left edge red, right blue."""
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


def test_frames_per_second_behind_a_pause(tmp_path):
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
  assert (crop_and_resize(image, 8, 0.0) == 200).all()
  assert (crop_and_resize(image, 8, 1.0) == 0).all()


def test_what_is_no_video_is_said_in_a_sentence(clip, tmp_path):
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
  with pytest.raises(UserError, match="frames_per_second=0"):
    read_clip(clip, 32, 0)
