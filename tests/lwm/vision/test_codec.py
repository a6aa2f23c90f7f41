"""The file of a VQGAN, and frames to codes and back."""

import errno
import os

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from lwm.config.vqgan import PIXEL_RANGES, VQGANConfig
from lwm.errors import UserError
from lwm.vision.codec import Codec, save_vqgan, to_frames, to_pixels
from lwm.vision.pictures import decibels, peak_signal_to_noise, save_contact_sheet
from lwm.vision.vqgan import VQGAN

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


@pytest.fixture(scope="module")
def model():
  return VQGAN(TINY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("vqgan") / "new" / "vqgan.npz"
  save_vqgan(path, TINY, nnx.state(model))
  return path


def random_frames(count: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("pixel_range", PIXEL_RANGES)
def test_pixels_round_trip(pixel_range):
  frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
  pixels = to_pixels(frames, pixel_range)
  assert (pixels.min(), pixels.max()) == pixel_range
  np.testing.assert_array_equal(to_frames(pixels, pixel_range), frames)


def test_save_and_load_are_bit_exact(model, path):
  codec = Codec(path)
  assert codec.config == TINY
  loaded = jax.tree.leaves(codec.state)
  saved = jax.tree.leaves(nnx.state(model))
  for one, other in zip(loaded, saved, strict=True):
    np.testing.assert_array_equal(one, other)


def test_same_weights_same_file_other_weights_another(model, path, tmp_path):
  save_vqgan(tmp_path / "same.npz", TINY, nnx.state(model))
  save_vqgan(tmp_path / "other.npz", TINY, nnx.state(VQGAN(TINY, rngs=nnx.Rngs(1))))
  assert Codec(tmp_path / "same.npz").sha256 == Codec(path).sha256
  assert Codec(tmp_path / "other.npz").sha256 != Codec(path).sha256
  assert sorted(file.name for file in tmp_path.iterdir()) == ["other.npz", "same.npz"]


def test_a_full_disk_leaves_nothing(model, tmp_path, monkeypatch):
  def full(file, **arrays):
    file.write(b"PK")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(np, "savez", full)
  with pytest.raises(UserError, match="vqgan.npz could not be written .No space left on device"):
    save_vqgan(tmp_path / "vqgan.npz", TINY, nnx.state(model))
  assert not list(tmp_path.iterdir())


def test_the_config_is_first_in_the_file(path):
  """In another order, the same weights would have another hash, which datasets record."""
  with np.load(path) as file:
    assert file.files[:2] == ["config", "codebook"]


def test_codes_are_the_models_in_any_batch(model, path):
  frames = random_frames(7)
  codes = Codec(path, batch_size=3).encode(frames)
  assert codes.shape == (7, 8, 8) and codes.dtype == np.int32
  assert codes.min() >= 0 and codes.max() < TINY.codebook_size
  np.testing.assert_array_equal(codes, jax.jit(model.encode)(to_pixels(frames, (-1, 1))))
  np.testing.assert_array_equal(codes[4:5], Codec(path, batch_size=3).encode(frames[4:5]))


def test_decode_takes_rows_of_codes_and_repeats_itself(path):
  codec = Codec(path)
  codes = codec.encode(random_frames(2))
  frames = codec.decode(codes)
  assert frames.shape == (2, 16, 16, 3) and frames.dtype == np.uint8
  np.testing.assert_array_equal(frames, Codec(path).decode(codes.reshape(2, -1)))


def test_wrong_frames_and_codes_are_refused(path):
  codec = Codec(path)
  with pytest.raises(ValueError, match="uint8"):
    codec.encode(np.zeros((1, 16, 16, 3), np.float32))
  with pytest.raises(ValueError, match="16"):
    codec.encode(np.zeros((1, 8, 8, 3), np.uint8))
  with pytest.raises(ValueError, match="16"):
    codec.decode(np.full((1, 8, 8), TINY.codebook_size))


def test_files_that_are_not_a_vqgan(path, tmp_path):
  with pytest.raises(UserError, match="no VQGAN file"):
    Codec(tmp_path / "none.npz")
  (tmp_path / "text.npz").write_text("hello")
  with pytest.raises(UserError, match="text.npz is not a VQGAN file"):
    Codec(tmp_path / "text.npz")
  (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match="cut.npz is not a VQGAN file"):
    Codec(tmp_path / "cut.npz")
  with np.load(path) as file:
    arrays = dict(file)
  del arrays["codebook"]
  np.savez(tmp_path / "less.npz", **arrays)
  with pytest.raises(UserError, match="codebook"):
    Codec(tmp_path / "less.npz")


def test_contact_sheet(tmp_path):
  rows = [random_frames(3), random_frames(2)]
  save_contact_sheet(tmp_path / "new" / "sheet.png", rows, scale=2)
  with Image.open(tmp_path / "new" / "sheet.png") as image:
    sheet = np.asarray(image)
  assert sheet.shape == (2 * 32 + 4, 3 * 32 + 8, 3)
  np.testing.assert_array_equal(sheet[36::2, 36:68:2], rows[1][1])
  assert (sheet[36:, 72:] == 255).all()


def test_peak_signal_to_noise():
  black = np.zeros((2, 2), np.uint8)
  assert peak_signal_to_noise(black, black) == np.inf
  assert peak_signal_to_noise(black, black + 255) == 0.0
  assert peak_signal_to_noise(black, black + 51) == pytest.approx(13.979, abs=1e-3)
  assert decibels(2.0) == pytest.approx(20 * np.log10(255) - 10 * np.log10(2))
