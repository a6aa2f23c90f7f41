"""Trains a VQGAN on clips and evaluates it on held-out frames: weights, PSNR, and a picture.

Legend: N frames, H height, W width in pixels.
"""

import os
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from lwm.config.vqgan import VQGANConfig, VQGANTrainingConfig
from lwm.vision.codec import Codec, save_vqgan
from lwm.vision.pictures import peak_signal_to_noise, save_contact_sheet
from lwm.vision.train import Metrics, train

_REPORTS = 8
_FRAMES_IN_PICTURE = 6


def split_by_time(frames_NxHxWx3: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
  """Splits frames into the first, for training, and the last `held_out` share of them."""
  cut = len(frames_NxHxWx3) - round(len(frames_NxHxWx3) * held_out)
  return frames_NxHxWx3[:cut], frames_NxHxWx3[cut:]


def fit(
  path: str | os.PathLike,
  train_frames_NxHxWx3: np.ndarray,
  held_out: Mapping[str, np.ndarray],
  config: VQGANConfig,
  training: VQGANTrainingConfig,
  seed: int,
  log: Callable[[str], None] = print,
) -> Codec:
  """Trains, then writes the weights and a picture of held-out frames above their reconstructions.

  Args:
    path: file of the weights (.npz), written last, so that everything is complete if it exists. The
      picture has the same name and ends in .png.
    train_frames_NxHxWx3: uint8.
    held_out: uint8 frames [N, H, W, 3] of each clip, by name; not trained on.
    config: sizes.
    training: steps and rates.
    seed: seeds everything random.
    log: called with lines of progress and the PSNR of each held-out clip.

  Returns:
    The codec with these weights.

  Raises:
    ValueError, UserError: see `lwm.vision.train.train`.
  """
  every = max(1, training.steps // _REPORTS)

  def report(step: int, metrics: Metrics) -> None:
    if step % every == 0 or step == training.steps:
      used = int((metrics.wins_V > 0).sum())
      log(
        f"VQGAN step {step}/{training.steps}: reconstruction {metrics.reconstruction:.4f}, "
        f"commitment {metrics.commitment:.4f}, codes in the batch {used}/{config.codebook_size}"
      )

  path = pathlib.Path(path)
  state = train(train_frames_NxHxWx3, config, training, seed, report)
  unjudged = path.with_name(path.name + ".unjudged")
  save_vqgan(unjudged, config, state)
  codec = Codec(unjudged)
  rows = []
  for name, truth in held_out.items():
    reconstruction = codec.decode(codec.encode(truth))
    log(f"VQGAN held-out {name}: PSNR {peak_signal_to_noise(truth, reconstruction):.2f} dB")
    shown = np.linspace(0, len(truth) - 1, _FRAMES_IN_PICTURE).round().astype(int)
    rows += [truth[shown], reconstruction[shown]]
  save_contact_sheet(path.with_suffix(".png"), rows)
  unjudged.rename(path)
  return codec
