"""What evaluations read: flags for texts, films, questions and datasets."""

import contextlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import inference
from lwm import infer
from lwm.config.batch import MODALITIES
from lwm.data import VALIDATION, Dataset
from lwm.data.dataset import Split
from lwm.data.tokenizer import Tokenizer, file_sha256
from lwm.data.vision_tokens import evenly_spaced
from lwm.errors import UserError
from lwm.evals.choices import UserQuestion, read_questions
from lwm.evals.films import Event, Films, clips_of, film_and_events
from lwm.evals.prompts import Haystack, PromptWriter
from lwm.evals.questions import parse_range
from lwm.infer.films import check_films, read_codes, vision_ids


class Inputs:
  """Defines the flags that name what evaluations read, and reads it."""

  def __init__(self) -> None:
    self._haystack = flags.DEFINE_list(
      "haystack", [], "UTF-8 texts that hide needles, read in this order."
    )
    self._contexts = flags.DEFINE_list(
      "contexts",
      ["1024", "2048"],
      "Tokens of a prompt plus its answer. Losses and harness tasks use only the largest.",
    )
    self._hidden = flags.DEFINE_integer(
      "hidden", 4, "Number of needles or events to hide.", lower_bound=1
    )
    self._film = flags.DEFINE_multi_string("film", [], "A film that hides events; may be repeated.")
    self._events = flags.DEFINE_string(
      "events",
      None,
      "JSON lines of events to hide: file (a film or an image) and name (what it shows).",
    )
    self._dataset = flags.DEFINE_string(
      "dataset",
      None,
      "A prepared dataset; default: the run's. Without --film, its validation clips are the film "
      "and the events.",
    )
    self._clip_frames = flags.DEFINE_integer(
      "clip_frames",
      20,
      "Maximum number of frames of an event. The default is 5 s at LWM's rate, as in TimeScope.",
      lower_bound=1,
    )
    self._questions = flags.DEFINE_string(
      "questions", None, "JSON lines with the questions of multiple_choice."
    )
    self._given_frames = flags.DEFINE_integer(
      "given_frames", 4, "Frames of a clip given to the model; 0: only its caption.", lower_bound=0
    )
    self._frames = flags.DEFINE_integer("frames", 4, "Frames to generate per clip.", lower_bound=1)

  def contexts(self) -> list[int]:
    """The values of --contexts, ascending."""
    return sorted(set(parse_range(",".join(self._contexts.value or []), "contexts")))

  def check_films(self) -> None:
    """Raises UserError if a film or an image that the flags name cannot be read."""
    events = self._event_files()[1] if self._film.value else []
    asked = self.question_files(self.questions()) if self._questions.value else []
    check_films([*self._film.value, *events, *asked])

  def questions(self) -> list[UserQuestion]:
    """The questions of --questions. Raises UserError if they cannot be used."""
    if not self._questions.value:
      raise UserError("This evaluation needs questions: name a file with --questions.")
    return read_questions(pathlib.Path(self._questions.value))

  @staticmethod
  def question_files(questions: Sequence[UserQuestion]) -> list[str]:
    """The films and images that questions are about, each once."""
    return list(dict.fromkeys(file for question in questions for file in question.files))

  def question_codes(
    self, questions: Sequence[UserQuestion], checkpoint: inference.Checkpoint
  ) -> list[list[int]]:
    """The ids of the films and images of each question."""
    files = self.question_files(questions)
    if not files:
      return [[] for _ in questions]
    codec = checkpoint.codec()
    layout = codec.config.layout
    codes = read_codes(
      files,
      codec,
      jax.local_devices(),
      frames_per_second=checkpoint.flags.frames_per_second,
      max_frames=max(1, self.contexts()[-1] // layout.tokens_per_frame),
    )
    tokenizer, text_size = checkpoint.tokenizer, checkpoint.text_vocab_size
    ids = {
      file: vision_ids(tokenizer, text_size, layout, [codes_NxP]).tolist()
      for file, codes_NxP in zip(files, codes)
    }
    return [[index for file in question.files for index in ids[file]] for question in questions]

  def clips(
    self, checkpoint: inference.Checkpoint, dataset: Dataset, split: str, count: int
  ) -> dict[int, infer.Clip]:
    """Clips of a dataset that are long enough, by document, each cut in two.

    They are spread evenly, because documents of one film follow each other.
    """
    layout, documents = dataset.vision_layout, dataset.split(split)
    assert layout is not None
    needed = (self.given_frames + self.frames) * layout.tokens_per_frame
    long_enough = np.flatnonzero(documents.targets[:, MODALITIES.index("vision")] >= needed)
    clips: dict[int, infer.Clip] = {}
    for document in long_enough[evenly_spaced(len(long_enough), count)].tolist():
      tokens, _ = documents.read(document, 0, int(documents.lengths[document]))
      with contextlib.suppress(UserError):  # It has several clips, and the first is shorter.
        clips[document] = infer.cut_clip(
          tokens, checkpoint.text_vocab_size, layout, self.given_frames, self.frames
        )
    return clips

  @property
  def given_frames(self) -> int:
    """--given_frames."""
    return self._given_frames.value or 0

  @property
  def frames(self) -> int:
    """--frames."""
    return self._frames.value or 1

  def hidden(self) -> int:
    return self._hidden.value or 1

  def haystack(self, tokenizer: Tokenizer, tokens: int | None = None) -> list[int]:
    """At least `tokens` ids of the texts; by default as many as the longest context."""
    if not self._haystack.value:
      raise UserError("This evaluation needs a text: name files with --haystack.")
    return Haystack(self._haystack.value, tokenizer, tokens or max(self.contexts())).ids

  def fingerprint(self, kind: str) -> dict[str, Any]:
    """Hashes and settings that tell one haystack from another.

    Args:
      kind: "text", "film" or "questions".
    """
    paths = list(self._haystack.value or [])
    if kind == "film":
      paths = [*self._film.value, *([self._events.value] if self._events.value else [])]
    if kind == "questions":
      paths = [self._questions.value or "", *self.question_files(self.questions())]
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
      dataset = self.video_dataset(checkpoint)
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

  def video_dataset(self, checkpoint: inference.Checkpoint) -> Dataset:
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
