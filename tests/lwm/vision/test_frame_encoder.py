"""Codes do not depend on the devices nor on the frames that share a batch."""

import jax
import numpy as np
import pytest

from lwm.vision.codec import Codec
from lwm.vision.frame_encoder import FrameEncoder
from tests.lwm import films


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Codec:
  return Codec(films.write_vqgan(tmp_path_factory.mktemp("vqgan") / "vqgan.npz"))


def encode(codec: Codec, num_devices: int, clips: dict[int, np.ndarray], step: int):
  """The codes of clips that come `step` frames at a time, in turn."""
  encoder = FrameEncoder(codec, jax.devices()[:num_devices], frames_per_device=4)
  codes = {film: [] for film in clips}

  def take(encoded):
    for film, codes_NxP in encoded:
      codes[film].append(codes_NxP)

  for start in range(0, max(map(len, clips.values())), step):
    for film, frames in clips.items():
      take(encoder.add(film, frames[start : start + step]))
  take(encoder.flush())
  return {film: np.concatenate(parts) for film, parts in codes.items()}


@pytest.mark.slow
def test_one_device_and_eight_give_the_codes_of_the_codec(codec):
  size = (codec.config.resolution,) * 2
  clips = {film: films.frames(9 + 8 * film, film, size) for film in range(3)}
  for num_devices, step in ((1, 3), (8, 5)):
    encoded = encode(codec, num_devices, clips, step)
    for film, frames in clips.items():
      expected = codec.encode(frames).reshape(len(frames), -1)
      np.testing.assert_array_equal(encoded[film], expected)
