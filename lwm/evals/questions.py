"""Questions with known answers: what is asked, of which prompt, and how an answer is scored."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from lwm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Case:
  """One question of an evaluation, before its prompt exists.

  Attributes:
    context: tokens of the prompt and of the longest answer together.
    place: depth of what is asked for in percent, or its number from 1; None if neither is varied.
    sample: repetitions of the same context and place have different numbers.
  """

  context: int
  place: int | None
  sample: int

  @property
  def name(self) -> str:
    """Unique in an evaluation, and the same in each run."""
    return f"{self.context}/{'-' if self.place is None else self.place}/{self.sample}"

  def random(self, seed: int, evaluation: str) -> random.Random:
    """What decides the question: it depends on nothing else, so questions are reproducible."""
    return random.Random(f"{seed}/{evaluation}/{self.name}")


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt and how to score the text that follows it.

  Attributes:
    prompt: token ids.
    answers: texts that the answer should contain.
    decoys: texts that must not come before one of `answers`: the other candidates.
    in_order: whether the answers count only if they come in this order.
    facts: what the prompt hides and where, for the record of the answer.
  """

  prompt: list[int]
  answers: Sequence[str]
  decoys: Sequence[str] = ()
  in_order: bool = False
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)

  def score(self, text: str) -> float:
    """The fraction of the answers that the text contains, in [0, 1].

    This is RULER's recall without regard to case (arXiv 2404.06654), and for one answer LWM's exact
    match of a number anywhere in the text. With decoys or an order, it is 0 or 1.
    """
    text = text.lower()
    places = [text.find(answer.lower()) for answer in self.answers]
    if self.in_order:
      return float(places == sorted(places) and places[0] >= 0)
    found = [place for place in places if place >= 0]
    if self.decoys:
      others = [text.find(decoy.lower()) for decoy in self.decoys]
      first = min((place for place in others if place >= 0), default=len(text))
      return float(len(found) == len(places) and min(found) < first)
    return len(found) / len(places)


def cases(contexts: Sequence[int], places: Sequence[int | None], samples: int) -> list[Case]:
  """All cases; cases of one context and place follow each other, because their prompts share most.

  Args:
    contexts: tokens.
    places: see `Case`.
    samples: of each context and place.
  """
  return [
    Case(context, place, sample)
    for context in contexts
    for place in places
    for sample in range(samples)
  ]


def parse_range(text: str, flag: str) -> list[int]:
  """The numbers of START:STOP:STEP, STOP included, or of a list with commas.

  Raises:
    UserError: the text is neither.
  """
  try:
    if ":" in text:
      start, stop, step = map(int, text.split(":"))
      numbers = list(range(start, stop + 1, step))
    else:
      numbers = [int(number) for number in text.split(",")]
  except ValueError:
    numbers = []
  if not numbers:
    raise UserError(f"--{flag}={text} is neither START:STOP:STEP nor numbers with commas.")
  return numbers
