"""Cutting a held-out video document."""

import jax
import numpy as np
import pytest
from flax import nnx

from lwm import data
from lwm.config.experiment import DatasetConfig, Experiment, MixtureEntry, Stage
from lwm.config.model import ModelConfig
from lwm.config.vqgan import LWM_LAYOUT, VisionLayout, VQGANConfig
from lwm.data.vision_tokens import frame_codes, frame_tokens
from lwm.errors import UserError
from lwm.infer import cut_clip, sampled_codes
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.vision.codec import Codec, save_vqgan
from lwm.vision.vqgan import VQGAN

TEXT = 100


def make_document(num_frames, layout=LWM_LAYOUT):
  shape = num_frames, layout.codes_per_frame
  codes_NxP = np.random.default_rng(0).integers(0, layout.end_of_frame, shape)
  before, after = [1, 5, 6], [7, 2]
  frames = TEXT + frame_tokens(codes_NxP, layout)
  return codes_NxP, np.concatenate([before, frames, after]).astype(np.int32)


@pytest.mark.parametrize("layout", (LWM_LAYOUT, VisionLayout(64, 16384)))
def test_prompt_and_true_frames_rebuild_the_document(layout):
  P = layout.codes_per_frame
  codes_NxP, tokens = make_document(5, layout)
  clip = cut_clip(tokens, TEXT, layout, given=2, predicted=2)
  true_T = tokens[len(clip.prompt) : len(clip.prompt) + 2 * (P + 1)]
  np.testing.assert_array_equal(clip.prompt, tokens[: 3 + 2 * (P + 1)])
  np.testing.assert_array_equal(clip.codes_NxP, codes_NxP[:4])
  np.testing.assert_array_equal(sampled_codes(true_T, TEXT, layout), codes_NxP[2:4])


def test_all_frames_may_be_used():
  codes_NxP, tokens = make_document(3)
  clip = cut_clip(tokens, TEXT, LWM_LAYOUT, given=1, predicted=2)
  np.testing.assert_array_equal(clip.codes_NxP, frame_codes(tokens[3:-2] - TEXT))


def test_too_few_frames_is_one_sentence():
  with pytest.raises(UserError, match="has 3 frames, fewer than 2 given . 2 predicted"):
    cut_clip(make_document(3)[1], TEXT, LWM_LAYOUT, given=2, predicted=2)


def test_a_clip_ends_where_text_comes():
  image = np.concatenate([make_document(1)[1], make_document(2)[1]])
  with pytest.raises(UserError, match="has 1 frames"):
    cut_clip(image, TEXT, LWM_LAYOUT, given=1, predicted=1)


def test_a_vqgan_of_another_grid_from_frames_to_batches_and_back(tmp_path):
  config = VQGANConfig(
    resolution=16,
    hidden_channels=4,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    latent_channels=4,
    codebook_size=9000,
    codebook_width=4,
    norm_groups=2,
  )
  layout = config.layout
  assert (layout.tokens_per_frame, layout.vocab_size) == (65, 9216)
  save_vqgan(tmp_path / "vqgan.npz", config, nnx.state(VQGAN(config, rngs=nnx.Rngs(0))))
  codec = Codec(tmp_path / "vqgan.npz")
  frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
  # From both ends of the codebook.
  codes_NxP = codec.encode(frames).reshape(3, 64)
  codes_NxP[0, :2] = 0, 8999

  data.train_sentencepiece(["the cat sees a red house and runs"] * 9, tmp_path / "t.model", 300)
  tokenizer = data.load_tokenizer(tmp_path / "t.model")
  document = data.video_document(tokenizer, codes_NxP, "a cat", layout)
  with data.DatasetWriter(
    tmp_path / "video", tokenizer, vqgan_sha256=codec.sha256, layout=layout
  ) as writer:
    writer.write("train", document)
  dataset = data.Dataset(tmp_path / "video")
  assert dataset.vision_layout == layout

  experiment = Experiment(
    tokenizer=str(tokenizer.path),
    model=ModelConfig(text_vocab_size=300, vision_vocab_size=layout.vocab_size),
    datasets=[DatasetConfig("video", str(dataset.path))],
    stages=[Stage(sequence_length=256, tokens_per_batch=256, mixture=[MixtureEntry("video")])],
  )
  mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
  batch = data.Loader(experiment, 0, mesh).batch(0)
  tokens = np.asarray(batch["tokens"])[0][: len(document.tokens)]
  np.testing.assert_array_equal(tokens, document.tokens)
  assert np.asarray(batch["modality"]).sum() == 3 * 65

  clip = cut_clip(tokens, 300, layout, given=1, predicted=2)
  np.testing.assert_array_equal(clip.codes_NxP, codes_NxP)
  truth = tokens[len(clip.prompt) : len(clip.prompt) + 2 * 65]
  predicted = codec.decode(sampled_codes(truth, 300, layout))
  np.testing.assert_array_equal(predicted, codec.decode(codes_NxP)[1:])
