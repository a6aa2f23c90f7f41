"""Films that were cut off, in containers of which FFmpeg reads what is left without an error."""

import av
import numpy as np
import pytest

from lwm.errors import UserError
from lwm.vision.video import read_frames
from tests.lwm import films

CODECS = {
  ".avi": "mpeg4",
  ".flv": "flv",
  ".gif": "gif",
  ".m2ts": "mpeg2video",
  ".mkv": "mpeg4",
  ".ts": "libx264",
  ".webm": "libvpx",
  ".wmv": "wmv2",
}


def count(path, end=None) -> int:
  return sum(1 for _ in read_frames(path, 1, end=end, threads=1))


@pytest.mark.parametrize("suffix", CODECS)
def test_a_cut_film_is_told_from_a_whole_one(tmp_path, suffix):
  pixels = {"pix_fmt": "rgb8"} if suffix == ".gif" else {}
  path = films.write_film(tmp_path / f"film{suffix}", 64, codec=CODECS[suffix], **pixels)
  assert count(path) == 8
  content = path.read_bytes()
  # An odd number of bytes is no whole number of a transport stream's packets.
  path.write_bytes(content[: len(content) // 2 | 1])
  with pytest.raises(UserError, match=r"film.* (ends|is cut off) after \d\.\d s"):
    count(path)
  # What lies before the cut is complete.
  assert count(path, end=1.0) == 1


def test_sound_may_outlast_the_picture(tmp_path):
  path = tmp_path / "film.flv"
  with av.open(str(path), "w") as container:
    video = container.add_stream("flv", rate=8)
    video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
    audio = container.add_stream("pcm_s16le", rate=44100, layout="mono")
    for pixels in films.frames(16):
      container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(video.encode())
    for second in range(6):
      silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), "s16", "mono")
      silence.rate, silence.pts = 44100, 44100 * second
      container.mux(audio.encode(silence))
  with av.open(str(path)) as container:
    assert container.duration == 6 * av.time_base
  assert count(path) == 2
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match="ends after"):
    count(path)
