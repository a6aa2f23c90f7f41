"""Trains a VQGAN on video files and evaluates it on the last part of each.

    python -m experiments.train_vqgan --video=a.mp4 --video=b.mp4 --output=data/vqgan.npz \\
        --vqgan.codebook_size=1024 --training.steps=2000

Every setting of lwm/config/vqgan.py is a flag. The program also writes data/vqgan.png, a picture of
held-out frames, each above its reconstruction.
"""

import pathlib

import numpy as np
from absl import flags

from configs.models import laptop_vqgan
from experiments import flags as experiment_flags
from lwm.config.vqgan import VQGANTrainingConfig
from lwm.errors import UserError
from lwm.vision.fit import fit, split_by_time
from lwm.vision.video import read_clip

_VIDEO = flags.DEFINE_multi_string(
  "video", None, "A video file; repeat the flag for more files.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "The .npz file to write.", required=True)
_FRAMES_PER_SECOND = flags.DEFINE_float(
  "frames_per_second", None, "Frames to take per second of video [all]."
)
_HELD_OUT = flags.DEFINE_float("held_out", 0.15, "Share of each clip to hold out, at its end.")
_SEED = flags.DEFINE_integer("seed", 0, "Seeds everything random.")
_VQGAN = experiment_flags.define_settings("vqgan", laptop_vqgan())
_TRAINING = experiment_flags.define_settings("training", VQGANTrainingConfig())


def main(argv: list[str]) -> None:
  del argv
  output = pathlib.Path(_OUTPUT.value)
  if output.exists():
    raise UserError(f"{output} exists already: delete it, or name another --output.")
  if output.suffix != ".npz":
    raise UserError(f"--output={output} does not end in .npz.")
  if not 0 < _HELD_OUT.value < 1:
    raise UserError(f"--held_out={_HELD_OUT.value} is not between 0 and 1.")
  for flag, settings in (("vqgan", _VQGAN.value), ("training", _TRAINING.value)):
    try:
      settings.validate()
    except ValueError as error:
      raise UserError(f"--{flag}: {error}") from error
  train_frames, held_out = [], {}
  for path in _VIDEO.value:
    frames = read_clip(path, _VQGAN.value.resolution, _FRAMES_PER_SECOND.value)
    first, last = split_by_time(frames, _HELD_OUT.value)
    if not len(first) or not len(last):
      raise UserError(f"{path} has {len(frames)} frames: too few for --held_out={_HELD_OUT.value}.")
    train_frames.append(first)
    held_out[path] = last
  fit(output, np.concatenate(train_frames), held_out, _VQGAN.value, _TRAINING.value, _SEED.value)
  print(f"VQGAN: {output}, picture: {output.with_suffix('.png')}")


if __name__ == "__main__":
  experiment_flags.run(main)
