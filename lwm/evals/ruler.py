"""RULER's tasks that need no download (arXiv 2404.06654), and its effective length.

Templates, counts and scores are RULER's (NVIDIA/RULER, `scripts/data/synthetic`); its random words
are ours, and its essays are any text.
"""

import dataclasses
import math
import random as random_lib
import string
from collections.abc import Callable, Mapping, Sequence

from lwm.errors import UserError
from lwm.evals import words
from lwm.evals.needles import Sources, fill_lines, hide, line_breaks
from lwm.evals.prompts import Frame, PromptWriter, filled
from lwm.evals.questions import Case, Question

NOISE = (
  "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
# A context length counts as effective if the mean score reaches Llama-2-7B's at 4K.
THRESHOLD = 0.856
_NUM_DEPTHS = 40
# Below this context, RULER repeats words less often.
_LONG_CONTEXT = 4096

_VALUES: dict[str, Callable[[random_lib.Random], str]] = {
  "numbers": words.number,
  "words": lambda random: random.choice(words.compounds()),
  "uuids": words.uuid4,
}


@dataclasses.dataclass(frozen=True)
class Niah:
  """A variant of the needle in a haystack.

  Attributes:
    haystack: `noise`, `text`, or `needles`: other needles of the same form.
    key: kind of the keys: words or uuids.
    value: kind of the values: numbers or uuids.
    keys: hidden.
    values: of each key.
    asked: keys.
  """

  haystack: str
  key: str = "words"
  value: str = "numbers"
  keys: int = 1
  values: int = 1
  asked: int = 1

  def __call__(
    self, sources: Sources, random: random_lib.Random, case: Case, size: int
  ) -> Question:
    writer = sources.writer
    keys = _different(random, _VALUES[self.key], self.keys)
    values = {key: _different(random, _VALUES[self.value], self.values) for key in keys}
    needles = [self._needle(key, value) for key in keys for value in values[key]]
    random.shuffle(needles)
    asked = random.sample(keys, self.asked)
    frame = self._frame(asked)
    if self.haystack == "needles":
      pieces = [writer.encode(f"{needle}\n") for needle in needles]

      def other() -> str:
        return self._needle(_VALUES[self.key](random), _VALUES[self.value](random)) + "\n"

      room = writer.room(frame, size) - sum(map(len, pieces))
      lines, left = fill_lines(writer, room, other)
      if left < 0:
        raise UserError(
          f"The needles do not fit in a prompt of {size:,} tokens: make --contexts longer."
        )
      for piece in pieces:
        lines.insert(random.randint(0, len(lines)), piece)
      context = [index for line in lines for index in line] + line_breaks(writer, left)
      prompt = writer.write(frame, context)
    else:
      haystack = sources.haystack if self.haystack == "text" else _noise(writer, size)
      percents = random.sample(range(_NUM_DEPTHS), len(needles))
      depths = sorted(percent / (_NUM_DEPTHS - 1) for percent in percents)
      texts = [f" {needle} " for needle in needles]
      prompt, _ = hide(writer, frame, size, haystack, texts, depths)
    answers = [value for key in asked for value in values[key]]
    return Question(prompt, answers, facts={"keys": asked, "hidden": len(needles)})

  def _needle(self, key: str, value: str) -> str:
    return f"One of the special magic {self.value} for {key} is: {value}."

  def _frame(self, keys: Sequence[str]) -> Frame:
    query = f"{', '.join(keys[:-1])}, and {keys[-1]}" if len(keys) > 1 else keys[0]
    some, what, verb = "Some", self.value, "are"
    asks = f"What are all the special magic {what} for {query} mentioned in the provided text?"
    if self.asked * self.values == 1:
      some, what, verb = "A", self.value.removesuffix("s"), "is"
      asks = f"What is the special magic {what} for {query} mentioned in the provided text?"
    return Frame(
      f"{some} special magic {what} {verb} hidden within the following text. Make sure to memorize "
      f"it. I will quiz you about the {what} afterwards.\n",
      f"\n{asks}",
      f" The special magic {what} for {query} mentioned in the provided text {verb}",
    )


NIAH = {
  "niah_single_1": Niah("noise"),
  "niah_single_2": Niah("text"),
  "niah_single_3": Niah("text", value="uuids"),
  "niah_multikey_1": Niah("text", keys=4),
  "niah_multikey_2": Niah("needles"),
  "niah_multikey_3": Niah("needles", key="uuids", value="uuids"),
  "niah_multivalue": Niah("text", values=4),
  "niah_multiquery": Niah("text", keys=4, asked=4),
}


def variable_tracking(
  sources: Sources, random: random_lib.Random, case: Case, size: int
) -> Question:
  """A chain of five variables: all that were assigned one value are asked for."""
  writer = sources.writer
  names, value, lines = _chain(random, letters=5)
  example_names, example_value, example_lines = _chain(random, letters=3)
  places = sorted(random.sample(range(1, 6), len(example_lines)))
  example = [NOISE] * 6
  for place, line in reversed(list(zip(places, example_lines))):
    example.insert(place, line)
  shown = _tracking_frame(example_value)
  before = f"{shown.before}{''.join(example)}{shown.after}{shown.answer_prefix}"
  frame = _tracking_frame(value, f"{before}{' '.join(example_names)}\n\n")
  depths = sorted(random.random() for _ in lines)
  prompt, starts = hide(writer, frame, size, _noise(writer, size), lines, depths)
  return Question(prompt, names, facts={"value": value, "starts": starts})


def _chain(random: random_lib.Random, letters: int) -> tuple[list[str], str, list[str]]:
  """The names of five variables, their value, and the lines that assign it."""
  names = _different(
    random, lambda random: "".join(random.choices(string.ascii_uppercase, k=letters)), 5
  )
  value = str(random.randint(10000, 99999))
  lines = [f"VAR {names[0]} = {value}"]
  lines += [f"VAR {later} = VAR {name}" for name, later in zip(names, names[1:])]
  return names, value, [f"\n{line}\n" for line in lines]


def _tracking_frame(value: str, example: str = "") -> Frame:
  return Frame(
    f"{example}Memorize and track the chain(s) of variable assignment hidden in the following text."
    "\n\n",
    f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are "
    f"assigned the value {value}, they are: ",
  )


def common_words(sources: Sources, random: random_lib.Random, case: Case, size: int) -> Question:
  """The ten words that a numbered list repeats most often."""
  writer = sources.writer
  is_long = case.context >= _LONG_CONTEXT
  repeats = (30, 3) if is_long else (6, 1)
  shown, shown_list = _word_list(random, 40 if is_long else 20, (10, 3) if is_long else (3, 1))
  one = _common_frame()
  before = f"{one.before}{shown_list}{one.after}{one.answer_prefix} {_numbered(shown)}\n"
  frame = _common_frame(before)
  room, state = writer.room(frame, size), random.getstate()

  def make(num_words: int) -> tuple[list[str], list[int]]:
    random.setstate(state)
    common, text = _word_list(random, num_words, repeats)
    return common, writer.encode(text)

  (common, context), num_words = _longest(make, room, 11)
  context += line_breaks(writer, room - len(context))
  return Question(writer.write(frame, context), common, facts={"words": num_words})


def _word_list(
  random: random_lib.Random, num_words: int, repeats: tuple[int, int]
) -> tuple[list[str], str]:
  """The ten common words, and a numbered list that repeats them and all others."""
  chosen = words.sample_words(random, num_words)
  random.shuffle(chosen)
  listed = chosen[:10] * repeats[0] + chosen[10:] * repeats[1]
  random.shuffle(listed)
  return chosen[:10], _numbered(listed)


def _numbered(listed: Sequence[str]) -> str:
  return " ".join(f"{index}. {word}" for index, word in enumerate(listed, start=1))


def _common_frame(example: str = "") -> Frame:
  return Frame(
    f"{example}Below is a numbered list of words. In these words, some appear more often than "
    "others. Memorize the ones that appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
  )


def frequent_words(sources: Sources, random: random_lib.Random, case: Case, size: int) -> Question:
  """The three most frequent of coded words, whose frequencies follow a zeta distribution."""
  writer = sources.writer
  vocabulary = _different(
    random,
    lambda random: "".join(random.choices(string.ascii_lowercase, k=6)),
    max(case.context // 50, 4),
  )
  vocabulary[0] = "..."
  frame = Frame(
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. ",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
  )
  room, state = writer.room(frame, size), random.getstate()

  def make(num_words: int) -> tuple[list[str], list[int]]:
    random.setstate(state)
    counts = [int(num_words / k**2 * 6 / math.pi**2) for k in range(1, len(vocabulary) + 1)]
    coded = [word for word, count in zip(vocabulary, counts) for _ in range(count)]
    random.shuffle(coded)
    return vocabulary[1:4], writer.encode(" ".join(coded))

  # From 60 words on, the second to fourth word occur 9, 4 and 2 times.
  (answers, context), num_words = _longest(make, room, 60)
  # Fill up with dots, which the question says to ignore.
  context += filled(writer.encode(" ..."), room - len(context))
  return Question(writer.write(frame, context), answers, facts={"words": num_words})


def _longest[T](
  make: Callable[[int], tuple[T, list[int]]], room: int, fewest: int
) -> tuple[tuple[T, list[int]], int]:
  """The result of `make` for the largest number whose ids fit in `room`, and that number."""

  def fits(number: int) -> bool:
    return len(make(number)[1]) <= room

  if not fits(fewest):
    raise UserError(
      f"The task needs at least {fewest} words, which do not fit in {room:,} tokens: make "
      "--contexts longer."
    )
  low, high = fewest, 2 * fewest
  while fits(high):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return make(low), low


def _different[T](
  random: random_lib.Random, make: Callable[[random_lib.Random], T], count: int
) -> list[T]:
  """`count` different values."""
  values: dict[T, None] = {}
  while len(values) < count:
    values[make(random)] = None
  return list(values)


def _noise(writer: PromptWriter, size: int) -> list[int]:
  return filled(writer.encode(NOISE), size)


def effective_length(scores: Mapping[int, float]) -> int:
  """The longest context up to which every mean score reaches THRESHOLD; 0 if the first does not.

  Args:
    scores: mean score by context.
  """
  longest = 0
  for context in sorted(scores):
    if scores[context] < THRESHOLD:
      break
    longest = context
  return longest
