import numpy as np
import pytest

from lwm.config.vqgan import LWM_LAYOUT, VisionLayout, VQGANConfig
from lwm.data import frame_codes, frame_tokens


def test_every_codebook_of_up_to_8192_codes_has_the_layout_of_lwm():
  for codebook_size in (16, 512, 8192):
    layout = VQGANConfig(codebook_size=codebook_size).layout
    assert layout == LWM_LAYOUT
    assert (layout.codes_per_frame, layout.tokens_per_frame) == (256, 257)
    assert (layout.end_of_frame, layout.end_of_vision, layout.vocab_size) == (8192, 8193, 8448)


def test_another_grid_and_a_larger_codebook_have_a_layout_of_their_own():
  layout = VQGANConfig(resolution=128, codebook_size=16384).layout
  assert layout == VisionLayout(codes_per_frame=64, end_of_frame=16384)
  assert layout.vocab_size == 16384 + 256
  codes_NxP = np.arange(2 * 64).reshape(2, 64) + 16384 - 2 * 64
  tokens = frame_tokens(codes_NxP, layout)
  assert tokens.shape == (2 * 65,) and tokens[64] == 16384 and tokens[-1] == 16385
  np.testing.assert_array_equal(frame_codes(tokens, layout), codes_NxP)
  with pytest.raises(ValueError, match="frames of 256"):
    frame_tokens(codes_NxP)
  # The last id of a block of 256.
  assert VisionLayout(64, 9214).vocab_size == 9216 and VisionLayout(64, 9215).vocab_size == 9472


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
