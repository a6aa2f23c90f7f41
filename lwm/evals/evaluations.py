"""The evaluations that ask questions, by name."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from lwm.evals import films, needles, ruler
from lwm.evals.questions import Case, Question


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How questions are made, and which cases exist.

  Attributes:
    make: makes the question of a case: a prompt of a given number of tokens, from a source that
      `hides_in` names.
    answer_tokens: most tokens of an answer.
    varies: what varies apart from the context: "depth", "number", or "" for nothing.
    hides_in: "text", a haystack of the user's; "film"; or "" for what it makes itself. The first
      argument of `make` is a `films.Films` for films, and a `needles.Sources` otherwise.
    has_counts: whether the number of needles may be chosen.
  """

  make: Callable[[Any, random.Random, Case, int], Question]
  answer_tokens: int
  varies: str = ""
  hides_in: str = "text"
  has_counts: bool = False


RULER = {
  **{
    name: Evaluation(niah, 128, hides_in="text" if niah.haystack == "text" else "")
    for name, niah in ruler.NIAH.items()
  },
  "variable_tracking": Evaluation(ruler.variable_tracking, 30, hides_in=""),
  "common_words": Evaluation(ruler.common_words, 120, hides_in=""),
  "frequent_words": Evaluation(ruler.frequent_words, 50, hides_in=""),
}

FILMS = {
  "film_frame": Evaluation(films.frame_needle, 32, "depth", "film", has_counts=True),
  "film_clip": Evaluation(films.clip_needle, 32, "depth", "film", has_counts=True),
  "film_order": Evaluation(films.order, 64, "", "film", has_counts=True),
  "film_count": Evaluation(films.count, 8, "", "film", has_counts=True),
}

EVALUATIONS = {
  "needle": Evaluation(needles.needle, 32, "depth"),
  "several_needles": Evaluation(needles.several_needles, 128, has_counts=True),
  "latent_needle": Evaluation(needles.latent_needle, 32, "depth"),
  "nth_needle": Evaluation(needles.nth_needle, 32, "number", has_counts=True),
  "key_value": Evaluation(needles.key_value, 64, "depth", hides_in=""),
  **RULER,
  **FILMS,
}
