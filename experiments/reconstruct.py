"""Shows what a VQGAN makes of films and images.

    python -m experiments.reconstruct --input=films/ --vqgan=data/laptop/vqgan.npz --output=shown

For each film, prints PSNR and how many codes it uses, and writes a sheet (OUTPUT/NUMBER-NAME.png)
and a clip (OUTPUT/NUMBER-NAME.mp4), both with the source above and the reconstruction below.
"""

import itertools
import pathlib

import numpy as np
from absl import flags

from experiments import flags as experiment_flags
from experiments.runtime import devices, use_compilation_cache
from lwm.data.films import read_films
from lwm.errors import UserError
from lwm.vision.codec import Codec
from lwm.vision.decoder_process import Clip
from lwm.vision.pictures import peak_signal_to_noise, save_clip, save_contact_sheet
from lwm.vision.video import crop_and_resize, read_frames

_INPUT = flags.DEFINE_string("input", None, "Folder of films, or a manifest.", required=True)
_VQGAN = flags.DEFINE_string("vqgan", None, "The VQGAN's file.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make.", required=True)
_FRAMES_PER_SECOND = flags.DEFINE_float(
  "frames_per_second", 4.0, "Frames to take per second of film.", lower_bound=1e-6
)
_FRAMES = flags.DEFINE_integer("frames", 64, "Frames to take per film.", lower_bound=1)

# Frames of a sheet, spread evenly.
_COLUMNS = 8


def _read(clip: Clip, resolution: int) -> np.ndarray:
  """The first frames of a film: uint8 [N, resolution, resolution, 3]."""
  images = read_frames(clip.path, _FRAMES_PER_SECOND.value, start=clip.start, end=clip.end)
  first = itertools.islice(images, _FRAMES.value)
  return np.stack([crop_and_resize(image, resolution) for image in first])


def main(argv: list[str]) -> None:
  del argv
  devices()
  use_compilation_cache()
  codec = Codec(_VQGAN.value)
  output = pathlib.Path(_OUTPUT.value)
  if output.exists():
    raise UserError(f"{output} exists already: delete it, or name another --output.")
  films = read_films(_INPUT.value)
  output.mkdir(parents=True)
  clips = [clip for film in films if not film.problem for clip in film.clips]
  for number, clip in enumerate(clips):
    try:
      frames_NxHxWx3 = _read(clip, codec.config.resolution)
    except UserError as error:
      print(f"{clip.path}: left out: {error}", flush=True)
      continue
    codes = codec.encode(frames_NxHxWx3)
    decoded_NxHxWx3 = codec.decode(codes)
    path = output / f"{number}-{pathlib.Path(clip.path).stem}"
    shown = np.linspace(0, len(codes) - 1, min(_COLUMNS, len(codes)), dtype=int)
    save_contact_sheet(f"{path}.png", [frames_NxHxWx3[shown], decoded_NxHxWx3[shown]], scale=1)
    if len(codes) > 1:
      both = np.concatenate([frames_NxHxWx3, decoded_NxHxWx3], axis=1)
      save_clip(f"{path}.mp4", both, _FRAMES_PER_SECOND.value)
    print(
      f"{clip.path}: {len(codes)} frames, "
      f"PSNR {peak_signal_to_noise(frames_NxHxWx3, decoded_NxHxWx3):.2f} dB, "
      f"{len(np.unique(codes)):,} of {codec.config.codebook_size:,} codes: {path}.png",
      flush=True,
    )


if __name__ == "__main__":
  experiment_flags.run(main)
