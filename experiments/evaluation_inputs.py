"""What evaluations hide and where: flags for texts, films and datasets."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import inference
from lwm.data import VALIDATION, Dataset
from lwm.data.dataset import Split
from lwm.data.tokenizer import Tokenizer, file_sha256
from lwm.errors import UserError
from lwm.evals.films import Event, Films, clips_of, film_and_events
from lwm.evals.prompts import Haystack, PromptWriter
from lwm.evals.questions import parse_range
from lwm.infer.films import check_films, read_codes


class Inputs:
  """The flags of what evaluations read, which this object defines."""

  def __init__(self) -> None:
    self._haystack = flags.DEFINE_list(
      "haystack", [], "UTF-8 texts that hide needles, read in this order."
    )
    self._contexts = flags.DEFINE_list(
      "contexts",
      ["1024", "2048"],
      "Tokens of a prompt and its answer together; the largest limits losses and the harness.",
    )
    self._hidden = flags.DEFINE_integer(
      "hidden", 4, "Needles or events that are hidden.", lower_bound=1
    )
    self._film = flags.DEFINE_multi_string("film", [], "A film that hides events; may be repeated.")
    self._events = flags.DEFINE_string(
      "events",
      None,
      "JSON lines with the fields file, a film or an image, and name, what it shows.",
    )
    self._dataset = flags.DEFINE_string(
      "dataset",
      None,
      "A prepared dataset. Without --film, its validation clips are film and events.",
    )
    self._clip_frames = flags.DEFINE_integer(
      "clip_frames", 20, "Most frames of an event; TimeScope's clips last 5 s.", lower_bound=1
    )

  def contexts(self) -> list[int]:
    """The values of --contexts, ascending."""
    return sorted(set(parse_range(",".join(self._contexts.value or []), "contexts")))

  def check_films(self) -> None:
    """Raises UserError if a film of the flags cannot be read."""
    check_films([*self._film.value, *(self._event_files()[1] if self._film.value else [])])

  def hidden(self) -> int:
    return self._hidden.value or 1

  def haystack(self, tokenizer: Tokenizer, tokens: int | None = None) -> list[int]:
    """The ids of the texts, at least so many; by default as many as the longest context."""
    if not self._haystack.value:
      raise UserError("This evaluation needs a text: name files with --haystack.")
    return Haystack(self._haystack.value, tokenizer, tokens or max(self.contexts())).ids

  def fingerprint(self, kind: str) -> dict[str, Any]:
    """What tells one haystack from another.

    Args:
      kind: "text" or "film".
    """
    paths = list(self._haystack.value or [])
    if kind == "film":
      paths = [*self._film.value, *([self._events.value] if self._events.value else [])]
    hashes: dict[str, Any] = {path: file_sha256(pathlib.Path(path))[:16] for path in paths}
    if kind == "film":
      hashes |= {"dataset": self._dataset.value, "clip_frames": self._clip_frames.value}
    return hashes

  def films(self, checkpoint: inference.Checkpoint, writer: PromptWriter) -> Films:
    """The film and the events of the flags.

    Raises:
      UserError: flags are missing, or name what cannot be used.
    """
    if self._film.value:
      codec = checkpoint.codec()
      layout = codec.config.layout
      names, paths = self._event_files()
      codes = read_codes(
        [*self._film.value, *paths],
        codec,
        jax.local_devices(),
        frames_per_second=checkpoint.flags.frames_per_second,
        max_frames=1 << 30,
      )
      film_NxP = np.concatenate(codes[: len(self._film.value)])
      clips = codes[len(self._film.value) :]
      events = [
        Event(name, clip_NxP[: self._clip_frames.value]) for name, clip_NxP in zip(names, clips)
      ]
    else:
      dataset = self._video_dataset(checkpoint)
      assert dataset.vision_layout is not None
      layout = dataset.vision_layout
      split = dataset.split(VALIDATION)
      clips_in = clips_of(split, checkpoint.tokenizer, checkpoint.text_vocab_size, layout)
      film_NxP, events = film_and_events(clips_in, self._clip_frames.value or 1)
    return Films(writer, film_NxP, events, layout, checkpoint.text_vocab_size, self.hidden())

  def _event_files(self) -> tuple[list[str], list[str]]:
    """The names and the files of --events."""
    path = pathlib.Path(self._events.value or "")
    try:
      records = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
      names, files = [record["name"] for record in records], [record["file"] for record in records]
    except (OSError, ValueError, TypeError, KeyError) as error:
      raise UserError(
        f"--events={path} is not a file of JSON lines with the fields file and name: {error}."
      ) from error
    if len(set(names)) < 2 or len(set(names)) < len(names):
      raise UserError(f"--events={path} must have at least two events with different names.")
    return names, files

  def _video_dataset(self, checkpoint: inference.Checkpoint) -> Dataset:
    """The dataset of --dataset, or the first of the run's with clips to validate on."""
    for dataset in self._opened(checkpoint).values():
      if dataset.vision_layout is not None and dataset.has_split(VALIDATION):
        return dataset
    raise UserError(
      "No dataset has a validation split with films: name a film with --film, and clips with "
      "--events."
    )

  def _opened(self, checkpoint: inference.Checkpoint) -> dict[str, Dataset]:
    """The prepared datasets of the flags or of the run, by name."""
    named = {config.name: config.path for config in checkpoint.stored.experiment.datasets}
    if self._dataset.value:
      named = {pathlib.Path(self._dataset.value).name: self._dataset.value}
    datasets = {name: Dataset(path, checkpoint.text_vocab_size) for name, path in named.items()}
    for dataset in datasets.values():
      dataset.check_tokenizer(checkpoint.tokenizer)
    return datasets

  def datasets(
    self, checkpoint: inference.Checkpoint
  ) -> dict[str, tuple[str, Split, dict[str, float]]]:
    """The validation splits, by path: the name, the split, and its unigram entropy."""
    splits = {
      str(dataset.path): (name, dataset.split(VALIDATION), dataset.unigram_entropy(VALIDATION))
      for name, dataset in self._opened(checkpoint).items()
      if dataset.has_split(VALIDATION)
    }
    if not splits:
      raise UserError("No dataset has a validation split: name one with --dataset.")
    return splits
