"""Makes a dataset of frames, which VQGANs train on, from videos and images.

    python -m experiments.prepare_frames --input=films/ --output=data/frames --resolution=256

--input is a folder, whose files and those in all folders below it are films, or a manifest of JSON
lines (lwm/data/films.py). Every container that FFmpeg reads, and images, are films. From each
frame, the largest centred square is cut and scaled to --resolution. The last part of each film is
held out, --validation_fraction of it; of images, this share is chosen by hash of their paths.

Films that cannot be read are lines of OUTPUT/bad_records.jsonl. A killed command continues when it
is given again. Several workers share the work; the command without --num_shards makes the dataset
of what they have made:

    python -m experiments.prepare_frames ... --num_shards=16 --shard_index=$INDEX
    python -m experiments.prepare_frames ...
"""

import sys

from absl import flags

from experiments import dataset_summary, decoding, flags as experiment_flags, shards
from lwm.data.dataset import TRAIN, VALIDATION
from lwm.data.films import digest, read_films
from lwm.data.frame_job import FrameJob, single_clips
from lwm.data.frame_parts import FrameParts
from lwm.data.frames import FrameDataset
from lwm.errors import UserError

_INPUT = flags.DEFINE_string("input", None, "Folder of films, or a manifest.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make.", required=True)
_RESOLUTION = flags.DEFINE_integer(
  "resolution", 256, "Pixels along one side of a frame.", lower_bound=1
)
_VALIDATION_FRACTION = flags.DEFINE_float(
  "validation_fraction", 0.05, "Share of each film to hold out, at its end."
)
_SHARDS = shards.Shards()
for module in (decoding, shards):
  flags.adopt_module_key_flags(module)


def main(argv: list[str]) -> None:
  del argv
  # File names may contain bytes that are not UTF-8.
  sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
  if not 0 <= _VALIDATION_FRACTION.value < 1:
    raise UserError(f"--validation_fraction={_VALIDATION_FRACTION.value} is not in [0, 1).")
  share = _SHARDS.share()
  films = single_clips(read_films(_INPUT.value))
  parts = FrameParts(
    _OUTPUT.value,
    _RESOLUTION.value,
    {
      "input": digest(films),
      "frames_per_second": decoding.FRAMES_PER_SECOND.value,
      "max_frames": decoding.MAX_FRAMES.value,
      "films_per_part": decoding.FILMS_PER_PART.value,
      "validation_fraction": _VALIDATION_FRACTION.value,
    },
  )
  films_per_part = decoding.FILMS_PER_PART.value
  assert films_per_part  # It has a default.
  count = -(-len(films) // films_per_part)
  numbers = [
    n for n in range(count) if (share or shards.ALL).is_mine(n) and not parts.is_complete(n)
  ]
  job = FrameJob(films, films_per_part, parts, _VALIDATION_FRACTION.value)
  with decoding.new_decoders(_RESOLUTION.value) as pool:
    job.run(numbers, pool, decoding.part_printer(len(numbers)))
  if share:
    share.print_complete()
    return
  parts.join(count)
  dataset = FrameDataset(_OUTPUT.value)
  for split in (TRAIN, VALIDATION):
    print(f"{split}: {dataset.num_frames(split):,} frames")
  dataset_summary.print_bad_records(dataset, "films")


if __name__ == "__main__":
  experiment_flags.run(main)
