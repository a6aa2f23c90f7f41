"""Tokenises films and images into a dataset that training reads.

    python -m experiments.tokenize_video --input=films/ --vqgan=data/laptop/vqgan.npz \\
        --tokenizer=data/laptop/tokenizer.model --output=data/films

The input is a folder or a manifest with captions, dialogues, and times (docs/films.md). Each film
becomes a document; a film that cannot be read is a line of bad_records.jsonl. A killed command
continues when it is given again. The processes of one job (SLURM, a TPU pod, or --coordinator,
--num_processes and --process_id) share the work. Independent workers can share it too: each makes
one shard, and the command without --num_shards then joins the shards into the dataset:

    python -m experiments.tokenize_video ... --num_shards=16 --shard_index=$INDEX
    python -m experiments.tokenize_video ...
"""

import sys
from collections.abc import Callable

import jax
from absl import flags

from experiments import dataset_summary, decoding, flags as experiment_flags, shards
from experiments.runtime import devices, use_compilation_cache
from lwm.data.dataset import Dataset
from lwm.data.film_documents import FilmDocuments, RowSettings
from lwm.data.film_job import FilmJob
from lwm.data.film_throughput import throughput
from lwm.data.films import digest, read_films
from lwm.data.parts import Vocabulary
from lwm.data.tokenizer import load_tokenizer
from lwm.data.writer import DatasetParts
from lwm.errors import UserError
from lwm.parallel import distributed
from lwm.vision.codec import Codec
from lwm.vision.frame_encoder import FrameEncoder

_INPUT = flags.DEFINE_string("input", None, "Folder of films, or a manifest.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make.", required=True)
_VQGAN = flags.DEFINE_string("vqgan", None, "The VQGAN's file.", required=True)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "A *.model or tokenizer.json file.", required=True
)
_FRAMES_PER_DEVICE = flags.DEFINE_integer(
  "frames_per_device", 32, "Frames that a device encodes at a time.", lower_bound=1
)
_CAPTION_LAST = flags.DEFINE_float(
  "caption_last",
  0.0,
  "Probability that a caption follows its frames and is trained on in their place; LWM takes 0.5.",
  lower_bound=0,
  upper_bound=1,
)
_CAPTION_DROPOUT = flags.DEFINE_float(
  "caption_dropout",
  0.0,
  "Probability that a caption before the frames is left out, for classifier-free guidance.",
  lower_bound=0,
  upper_bound=1,
)
_SUBSAMPLE_FRAMES = flags.DEFINE_integer(
  "subsample_frames", None, "Frames to keep per film, spread evenly; all by default.", lower_bound=1
)
_VALIDATION_FRACTION = flags.DEFINE_float(
  "validation_fraction", 0.0, "Share of the films to hold out, chosen by hash of their paths."
)
_THROUGHPUT_SECONDS = flags.DEFINE_float(
  "throughput_seconds",
  None,
  "Write nothing: measure decoding, encoding, and both for this many seconds each.",
  lower_bound=0.1,
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Number of processes of one job, which share the work."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_SHARDS = shards.Shards()
for module in (decoding, shards):
  flags.adopt_module_key_flags(module)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of captions, their order and dropout.")


def _new_encoder(codec: Codec) -> FrameEncoder:
  use_compilation_cache()
  return FrameEncoder(codec, jax.local_devices(), _FRAMES_PER_DEVICE.value)


def work(share: shards.Share) -> Callable[[], None]:
  """Makes a share of the parts. Returns what makes the dataset when all parts are complete."""
  if not 0 <= _VALIDATION_FRACTION.value < 1:
    raise UserError(f"--validation_fraction={_VALIDATION_FRACTION.value} is not in [0, 1).")
  tokenizer, codec = load_tokenizer(_TOKENIZER.value), Codec(_VQGAN.value)
  films = read_films(_INPUT.value)
  layout = codec.config.layout
  rows = RowSettings(
    _SEED.value, _CAPTION_LAST.value, _CAPTION_DROPOUT.value, _SUBSAMPLE_FRAMES.value
  )
  settings = (
    *(decoding.FRAMES_PER_SECOND, decoding.MAX_FRAMES, decoding.FILMS_PER_PART),
    *(_VALIDATION_FRACTION, _CAPTION_LAST, _CAPTION_DROPOUT, _SUBSAMPLE_FRAMES, _SEED),
  )
  parts = DatasetParts(
    _OUTPUT.value,
    Vocabulary(tokenizer, codec.sha256, layout),
    {"input": digest(films), **{flag.name: flag.value for flag in settings}},
  )
  job = FilmJob(
    films,
    decoding.FILMS_PER_PART.value,
    parts,
    FilmDocuments(tokenizer, layout, rows),
    _VALIDATION_FRACTION.value,
  )
  count = -(-len(films) // decoding.FILMS_PER_PART.value)
  numbers = [n for n in range(count) if share.is_mine(n) and not parts.is_complete(n)]
  if numbers:
    encoder = _new_encoder(codec)
    with decoding.new_decoders(codec.config.resolution) as pool:
      job.run(numbers, pool, encoder, decoding.part_printer(len(numbers)))

  def join() -> None:
    parts.join(count)
    dataset = Dataset(_OUTPUT.value)
    dataset_summary.print_splits(dataset)
    dataset_summary.print_bad_records(dataset, "films")

  return join


def _print_throughput(seconds: float) -> None:
  codec = Codec(_VQGAN.value)
  rates = throughput(
    read_films(_INPUT.value),
    lambda: decoding.new_decoders(codec.config.resolution),
    _new_encoder(codec),
    seconds,
  )
  for name, rate in rates:
    print(f"{name}: {rate:,.1f} frames/s", flush=True)


def main(argv: list[str]) -> None:
  del argv
  # File names may contain bytes that are not UTF-8.
  sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
  share = _SHARDS.share()
  if share:
    # Don't join a job, even where the environment of a scheduler describes one: workers are
    # independent of each other.
    devices()
    work(share)
    share.print_complete()
    return
  with distributed.joined(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value):
    devices()
    if _THROUGHPUT_SECONDS.value:
      _print_throughput(_THROUGHPUT_SECONDS.value)
      return
    share = shards.Share(jax.process_count(), jax.process_index())
    join = work(share)
  # All processes have left the context, so all parts are complete.
  if share.index == 0:
    join()


if __name__ == "__main__":
  experiment_flags.run(main)
