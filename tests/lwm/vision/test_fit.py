"""Training on clips, evaluated on held-out frames."""

import re

import numpy as np
import pytest
from PIL import Image

from lwm.config.vqgan import VQGANConfig, VQGANTrainingConfig
from lwm.vision.codec import Codec
from lwm.vision.fit import fit, split_by_time

TINY = VQGANConfig(
  resolution=16,
  hidden_channels=8,
  channel_multipliers=(1, 2),
  num_res_blocks=1,
  latent_channels=8,
  codebook_size=16,
  codebook_width=4,
  norm_groups=4,
)


def test_only_the_last_frames_are_held_out():
  frames = np.arange(132)
  first, last = split_by_time(frames, 0.15)
  assert len(last) == 20
  np.testing.assert_array_equal(np.concatenate([first, last]), frames)


@pytest.mark.slow
def test_weights_picture_and_psnr_of_a_clip(tmp_path):
  ramp = np.linspace(0, 255, 16).astype(np.uint8)
  frames = np.stack([np.roll(np.tile(ramp, (16, 1)), i, axis=0) for i in range(12)])
  frames = frames[..., None].repeat(3, -1)
  first, last = split_by_time(frames, 0.25)
  training = VQGANTrainingConfig(steps=30, continuous_steps=10, batch_size=4, warmup_steps=2)
  lines = []
  codec = fit(tmp_path / "v.npz", first, {"ramp": last}, TINY, training, 0, lines.append)
  # A grey of 128 everywhere would reach 10.8 dB.
  assert float(re.search(r"held-out ramp: PSNR ([\d.]+) dB", lines[-1])[1]) > 14
  assert lines[-2].startswith("VQGAN step 30/30")
  assert sorted(file.name for file in tmp_path.iterdir()) == ["v.npz", "v.png"]
  assert Codec(tmp_path / "v.npz").sha256 == codec.sha256
  with Image.open(tmp_path / "v.png") as picture:
    np.testing.assert_array_equal(np.asarray(picture)[:32:2, :32:2], last[0])
