"""Cutting a held-out video document."""

import numpy as np
import pytest

from lwm.data.vision_tokens import frame_codes, frame_tokens
from lwm.errors import UserError
from lwm.infer import SAMPLED, cut_clip, sampled_codes

TEXT = 100


def make_document(num_frames):
  codes_NxP = np.random.default_rng(0).integers(0, 8192, (num_frames, 256))
  before, after = [1, 5, 6], [7, 2]
  return codes_NxP, np.concatenate([before, TEXT + frame_tokens(codes_NxP), after]).astype(np.int32)


def test_prompt_and_forced_marks_rebuild_the_document():
  codes_NxP, tokens = make_document(5)
  clip = cut_clip(tokens, TEXT, given=2, predicted=2)
  true_T = tokens[len(clip.prompt) : len(clip.prompt) + len(clip.forced)]
  np.testing.assert_array_equal(clip.prompt, tokens[: 3 + 2 * 257])
  np.testing.assert_array_equal(np.nonzero(clip.forced != SAMPLED)[0], [256, 513])
  np.testing.assert_array_equal(clip.forced[clip.forced != SAMPLED], true_T[[256, 513]])
  np.testing.assert_array_equal(clip.codes_NxP, codes_NxP[:4])
  np.testing.assert_array_equal(sampled_codes(true_T, TEXT), codes_NxP[2:4])


def test_all_frames_may_be_used():
  codes_NxP, tokens = make_document(3)
  clip = cut_clip(tokens, TEXT, given=1, predicted=2)
  np.testing.assert_array_equal(clip.codes_NxP, frame_codes(tokens[3:-2] - TEXT))


def test_too_few_frames_is_one_sentence():
  with pytest.raises(UserError, match="has 3 frames, fewer than 2 given . 2 predicted"):
    cut_clip(make_document(3)[1], TEXT, given=2, predicted=2)


def test_a_clip_ends_where_text_comes():
  image = np.concatenate([make_document(1)[1], make_document(2)[1]])
  with pytest.raises(UserError, match="has 1 frames"):
    cut_clip(image, TEXT, given=1, predicted=1)
