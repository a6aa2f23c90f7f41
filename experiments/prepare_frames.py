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

import os
import sys
import time

from absl import flags

from experiments import flags as experiment_flags, shards
from lwm.data.dataset import TRAIN, VALIDATION
from lwm.data.film_job import PartReport
from lwm.data.films import digest, read_films
from lwm.data.frame_job import FrameJob
from lwm.data.frame_parts import FrameParts
from lwm.data.frames import FrameDataset
from lwm.errors import UserError
from lwm.vision import decoders

_INPUT = flags.DEFINE_string("input", None, "Folder of films, or a manifest.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make.", required=True)
_RESOLUTION = flags.DEFINE_integer(
  "resolution", 256, "Pixels along one side of a frame.", lower_bound=1
)
_FRAMES_PER_SECOND = flags.DEFINE_float(
  "frames_per_second", 4.0, "Frames to take per second of film.", lower_bound=1e-6
)
_MAX_FRAMES = flags.DEFINE_integer(
  "max_frames", 100_000, "A film with more frames is bad.", lower_bound=1
)
_TIMEOUT = flags.DEFINE_float(
  "timeout", 60.0, "A film is bad after this many seconds without a frame.", lower_bound=1e-3
)
_DECODERS = flags.DEFINE_integer(
  "decoders", os.cpu_count() or 1, "Processes that decode films, one at a time each.", lower_bound=1
)
_FILMS_PER_PART = flags.DEFINE_integer(
  "films_per_part",
  64,
  "Films to write at a time; a killed command makes its unfinished parts again.",
  lower_bound=1,
)
_VALIDATION_FRACTION = flags.DEFINE_float(
  "validation_fraction", 0.05, "Share of each film to hold out, at its end."
)
_SHARDS = shards.Shards()
flags.adopt_module_key_flags(shards)


def main(argv: list[str]) -> None:
  del argv
  # File names may contain bytes that are not UTF-8.
  sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
  if not 0 <= _VALIDATION_FRACTION.value < 1:
    raise UserError(f"--validation_fraction={_VALIDATION_FRACTION.value} is not in [0, 1).")
  is_share = _SHARDS.is_share()
  films = read_films(_INPUT.value)
  parts = FrameParts(
    _OUTPUT.value,
    _RESOLUTION.value,
    {
      "input": digest(films),
      "frames_per_second": _FRAMES_PER_SECOND.value,
      "max_frames": _MAX_FRAMES.value,
      "films_per_part": _FILMS_PER_PART.value,
      "validation_fraction": _VALIDATION_FRACTION.value,
    },
  )
  count = -(-len(films) // _FILMS_PER_PART.value)
  numbers = [n for n in range(count) if _SHARDS.is_mine(n) and not parts.is_complete(n)]
  _make(FrameJob(films, _FILMS_PER_PART.value, parts, _VALIDATION_FRACTION.value), numbers)
  if is_share:
    _SHARDS.print_complete()
    return
  parts.join(count)
  dataset = FrameDataset(_OUTPUT.value)
  for split in (TRAIN, VALIDATION):
    print(f"{split}: {dataset.num_frames(split):,} frames")
  bad = dataset.manifest["bad_records"]
  report = f" (see {dataset.path / 'bad_records.jsonl'})" if bad else ""
  print(f"{bad:,} bad films{report}; dataset: {dataset.path}")


def _make(job: FrameJob, numbers: list[int]) -> None:
  """Makes parts, and prints a line for each."""
  start = time.monotonic()
  frames = parts = 0

  def report(part: PartReport) -> None:
    nonlocal frames, parts
    frames, parts = frames + part.frames, parts + 1
    rate = frames / (time.monotonic() - start)
    print(
      f"part {part.number}: {part.films:,} films, {part.bad_films:,} of them bad, "
      f"{part.frames:,} frames; {parts:,} of {len(numbers):,} parts, {rate:,.0f} frames/s",
      flush=True,
    )

  decoding = decoders.settings(
    _RESOLUTION.value, _FRAMES_PER_SECOND.value, _MAX_FRAMES.value, _TIMEOUT.value
  )
  assert _DECODERS.value  # It has a default.
  with decoders.Decoders(_DECODERS.value, decoding) as pool:
    job.run(numbers, pool, report)


if __name__ == "__main__":
  experiment_flags.run(main)
