"""The evaluations that ask questions about texts, by name."""

import dataclasses

from lwm.evals import needles, ruler
from lwm.evals.needles import Make


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How questions are made, and which cases exist.

  Attributes:
    make: makes the question of a case.
    answer_tokens: most tokens of an answer.
    varies: what varies beside the context: "depth", "number", or "" for nothing.
    needs_haystack: whether it hides needles in a text of the user's.
    has_counts: whether the number of needles may be chosen.
  """

  make: Make
  answer_tokens: int
  varies: str = ""
  needs_haystack: bool = True
  has_counts: bool = False


RULER = {
  **{
    name: Evaluation(niah, 128, needs_haystack=niah.haystack == "text")
    for name, niah in ruler.NIAH.items()
  },
  "variable_tracking": Evaluation(ruler.variable_tracking, 30, needs_haystack=False),
  "common_words": Evaluation(ruler.common_words, 120, needs_haystack=False),
  "frequent_words": Evaluation(ruler.frequent_words, 50, needs_haystack=False),
}

EVALUATIONS = {
  "needle": Evaluation(needles.needle, 32, "depth"),
  "several_needles": Evaluation(needles.several_needles, 128, has_counts=True),
  "latent_needle": Evaluation(needles.latent_needle, 32, "depth"),
  "nth_needle": Evaluation(needles.nth_needle, 32, "number", has_counts=True),
  "key_value": Evaluation(needles.key_value, 64, "depth", needs_haystack=False),
  **RULER,
}
