"""Frames and clips hidden in a film, as codes; answers are decoded freely.

A frame is a needle in LongVILA (arXiv 2408.10188), a short clip in TimeScope; VNBench (arXiv
2406.09367) asks for the order and the number of inserted events.

N frames, P codes per frame.
"""

import dataclasses
import random as random_lib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lwm.config.vqgan import VisionLayout
from lwm.data.dataset import Split
from lwm.data.tokenizer import Tokenizer
from lwm.data.vision_tokens import VISION_END, VISION_START, frame_codes
from lwm.errors import UserError
from lwm.evals.prompts import Frame, PromptWriter
from lwm.evals.questions import Case, Question
from lwm.infer.films import vision_ids


class Event(NamedTuple):
  """A short clip that may be put into a film.

  Attributes:
    name: what it shows, in a few words that no other event's name contains.
    codes_NxP: int32.
  """

  name: str
  codes_NxP: np.ndarray


@dataclasses.dataclass(frozen=True)
class Films:
  """The sources of questions about films.

  Attributes:
    writer: of prompts.
    film_NxP: codes of the film that hides events.
    events: with different names.
    layout: of the frames.
    text_vocab_size: text ids of the model; vision ids follow them.
    hidden: most events that a prompt hides.
  """

  writer: PromptWriter
  film_NxP: np.ndarray
  events: Sequence[Event]
  layout: VisionLayout
  text_vocab_size: int
  hidden: int

  def write(
    self, question: str, size: int, clips: Sequence[np.ndarray], depths: Sequence[float]
  ) -> tuple[list[int], list[int]]:
    """A film with clips in it and a question after it.

    As many whole frames of the film are used as fit in `size` ids.

    Args:
      question: text.
      size: the most tokens of the prompt.
      clips: codes of each.
      depths: of each, ascending, in [0, 1].

    Returns:
      The prompt, and at which frame each clip begins.

    Raises:
      UserError: the film is too short, or the clips do not fit.
    """
    frame = Frame("", f"\n{question}")
    marks = len(self._ids(self.film_NxP[:1])) - self.layout.tokens_per_frame
    frames = (self.writer.room(frame, size) - marks) // self.layout.tokens_per_frame
    around = frames - sum(map(len, clips))
    if around < 0:
      raise UserError(
        f"The clips have {frames - around:,} frames, and a prompt of {size:,} tokens has room for "
        f"{max(frames, 0):,}: make --contexts longer, or --clip_frames smaller."
      )
    if around > len(self.film_NxP):
      raise UserError(
        f"The film has {len(self.film_NxP):,} frames, fewer than the {around:,} that a prompt of "
        f"{size:,} tokens needs: name more films, or make --contexts shorter."
      )
    parts, starts, last = [], [], 0
    for clip_NxP, depth in zip(clips, depths, strict=True):
      place = round(depth * around)
      parts += [self.film_NxP[last:place], clip_NxP]
      starts.append(sum(map(len, parts)) - len(clip_NxP))
      last = place
    film_NxP = np.concatenate([*parts, self.film_NxP[last:around]])
    return self.writer.write(frame, self._ids(film_NxP).tolist()), starts

  def _ids(self, codes_NxP: np.ndarray) -> np.ndarray:
    return vision_ids(self.writer.tokenizer, self.text_vocab_size, self.layout, [codes_NxP])

  def choose(self, random: random_lib.Random) -> list[Event]:
    """Different events, in random order, at most `hidden` of them."""
    return random.sample(list(self.events), min(self.hidden, len(self.events)))


def frame_needle(films: Films, random: random_lib.Random, case: Case, size: int) -> Question:
  """The middle frame of an event, at the depth of the case."""
  events = films.choose(random)
  codes_NxP = events[0].codes_NxP
  middle = len(codes_NxP) // 2
  return _which(films, random, case, size, events, codes_NxP[middle : middle + 1])


def clip_needle(films: Films, random: random_lib.Random, case: Case, size: int) -> Question:
  """A whole clip, at the depth of the case."""
  events = films.choose(random)
  return _which(films, random, case, size, events, events[0].codes_NxP)


def _which(
  films: Films,
  random: random_lib.Random,
  case: Case,
  size: int,
  events: list[Event],
  codes_NxP: np.ndarray,
) -> Question:
  """Asks which of the events the codes are from; the first event is right."""
  assert case.place is not None
  names = [event.name for event in events]
  shuffled = random.sample(names, len(names))
  question = (
    f"One of these appears in the film: {'; '.join(shuffled)}. Which one? Answer with its words "
    "only."
  )
  prompt, starts = films.write(question, size, [codes_NxP], [case.place / 100])
  return Question(prompt, names[:1], names[1:], facts={"frames": starts})


def order(films: Films, random: random_lib.Random, case: Case, size: int) -> Question:
  """Events at random depths, whose order is asked for."""
  events = films.choose(random)
  names = [event.name for event in events]
  question = (
    f"These appear in the film: {'; '.join(random.sample(names, len(names)))}. In which order? "
    "Answer with their words only."
  )
  depths = sorted(random.random() for _ in events)
  prompt, starts = films.write(question, size, [event.codes_NxP for event in events], depths)
  return Question(prompt, names, in_order=True, facts={"frames": starts})


def count(films: Films, random: random_lib.Random, case: Case, size: int) -> Question:
  """One event, inserted up to nine times, whose number is asked for."""
  event = random.choice(list(films.events))
  times = random.randint(1, min(films.hidden, 9))
  question = f"How many times does this appear in the film: {event.name}? Answer with a digit only."
  depths = sorted(random.random() for _ in range(times))
  prompt, starts = films.write(question, size, [event.codes_NxP] * times, depths)
  others = [str(digit) for digit in range(10) if digit != times]
  return Question(prompt, [str(times)], others, facts={"event": event.name, "frames": starts})


def clips_of(
  split: Split, tokenizer: Tokenizer, text_vocab_size: int, layout: VisionLayout
) -> list[Event]:
  """The first clip of each document of a prepared dataset, named by the text before it."""
  events = []
  for document in range(len(split)):
    if not split.targets[document, 1]:
      continue
    tokens, _ = split.read(document, 0, int(split.lengths[document]))
    is_vision = tokens >= text_vocab_size
    first = int(np.argmax(is_vision))
    stop = first + int(np.argmin(np.append(is_vision[first:], False)))
    name = tokenizer.decode(tokens[:first].tolist())
    for mark in (VISION_START, VISION_END):
      name = name.replace(mark, "")
    codes_NxP = frame_codes(tokens[first:stop] - text_vocab_size, layout)
    events.append(Event(name.strip(), codes_NxP))
  return events


def film_and_events(clips: Sequence[Event], clip_frames: int) -> tuple[np.ndarray, list[Event]]:
  """One film of the clips that share the first one's name, and an event for each other name.

  Args:
    clips: of a dataset.
    clip_frames: most frames of an event.

  Raises:
    UserError: fewer than three names: there would be nothing to choose from.
  """
  by_name: dict[str, list[np.ndarray]] = {}
  for name, codes_NxP in clips:
    if name:
      by_name.setdefault(name, []).append(codes_NxP)
  if len(by_name) < 3:
    raise UserError(
      f"The dataset has clips of {len(by_name)} different captions: evaluations of films need at "
      "least 3 in its validation split."
    )
  film, *others = by_name
  events = [Event(name, by_name[name][0][:clip_frames]) for name in others]
  return np.concatenate(by_name[film]), events
