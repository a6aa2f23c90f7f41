import numpy as np
import pytest

from lwm.data import frame_codes, frame_tokens


def test_every_frame_ends_in_eof_and_the_last_in_eov_instead():
  codes_NxP = np.arange(3 * 256).reshape(3, 256)
  tokens = frame_tokens(codes_NxP)
  assert tokens.dtype == np.int32 and tokens.shape == (3 * 257,)
  assert tokens[256] == tokens[513] == 8192 and tokens[-1] == 8193
  np.testing.assert_array_equal(frame_codes(tokens), codes_NxP)


def test_an_image_ends_in_eov():
  assert frame_tokens(np.zeros((1, 256), int))[-1] == 8193


@pytest.mark.parametrize(
  "codes, reason",
  [
    (np.zeros((0, 256), int), "frames of 256"),
    (np.zeros((1, 255), int), "frames of 256"),
    (np.zeros((1, 256)), "not integers"),
    (np.full((1, 256), 8192), "code 8192 is not in"),
    (np.full((1, 256), -1), "code -1 is not in"),
  ],
)
def test_wrong_codes_are_refused(codes, reason):
  with pytest.raises(ValueError, match=reason):
    frame_tokens(codes)


def test_broken_frames_are_refused():
  tokens = frame_tokens(np.zeros((2, 256), int))
  with pytest.raises(ValueError, match="not frames"):
    frame_codes(tokens[:-1])
  with pytest.raises(ValueError, match="does not end"):
    frame_codes(tokens[:257])
  tokens[5] = 8192
  with pytest.raises(ValueError, match="among"):
    frame_codes(tokens)
