"""Facts hidden in a text: LWM's needles, needles that share no word with the question, needles that
look alike, and keys with values.
"""

import dataclasses
import random as random_lib
from collections.abc import Callable, Sequence

from lwm.errors import UserError
from lwm.evals import words
from lwm.evals.prompts import Frame, PromptWriter
from lwm.evals.questions import Case, Question


@dataclasses.dataclass(frozen=True)
class Sources:
  """What questions are made from.

  Attributes:
    writer: of prompts.
    haystack: ids of the text that hides needles; empty for evaluations that need none.
    hidden: how many needles a prompt hides, where that may be chosen.
    asked: how many of them it asks for.
  """

  writer: PromptWriter
  haystack: Sequence[int] = ()
  hidden: int = 1
  asked: int = 1


def hide(
  writer: PromptWriter,
  frame: Frame,
  size: int,
  haystack: Sequence[int],
  needles: Sequence[str],
  depths: Sequence[float],
) -> tuple[list[int], list[int]]:
  """A prompt of exactly `size` ids, with texts hidden in the beginning of a haystack.

  Args:
    writer: of prompts.
    frame: around the haystack.
    size: tokens of the prompt.
    haystack: at least `size` ids.
    needles: texts.
    depths: of each, ascending, in [0, 1].

  Returns:
    The prompt, and where in the context, in tokens, each needle begins.

  Raises:
    UserError: the needles leave no room.
  """
  pieces = [writer.encode(needle) for needle in needles]
  room = writer.room(frame, size) - sum(map(len, pieces))
  if room < 0:
    raise UserError(
      f"{len(needles)} needles do not fit in a prompt of {size:,} tokens: make --contexts longer, "
      "or hide fewer."
    )
  context, starts = writer.insert(haystack[:room], pieces, depths)
  return writer.write(frame, context), starts


def _lwm_frame(question: str) -> Frame:
  """LWM's prompt (LWM, `scripts/eval_needle.py`); its roles are the chat template's here."""
  after = (
    f" {question} Don't give information outside the document or repeat your findings. Keep your "
    "response short and direct."
  )
  return Frame("", after)


def needle_text(city: str, number: str) -> str:
  """LWM's needle."""
  return f"\nThe special magic {city} number is: {number}\n"


def needle_frame(city: str) -> Frame:
  """LWM's question about one needle."""
  return _lwm_frame(f"What is the special magic {city} number?")


def needle(sources: Sources, random: random_lib.Random, case: Case, size: int) -> Question:
  """LWM's needle: one number, at the depth of the case."""
  assert case.place is not None
  city, number = random.choice(words.CITIES), words.number(random)
  frame = needle_frame(city)
  texts = [needle_text(city, number)]
  prompt, starts = hide(sources.writer, frame, size, sources.haystack, texts, [case.place / 100])
  return Question(prompt, [number], facts={"city": city, "starts": starts})


def needle_conversation(
  sources: Sources, random: random_lib.Random, size: int
) -> tuple[list[int], list[bool]]:
  """A document to learn from: a prompt of `needle` and its answer.

  The needle is at a random multiple of a tenth of the haystack, the very beginning and the very end
  included.

  Args:
    sources: with a haystack of at least `size` ids.
    random: decides the document.
    size: tokens of the document.

  Returns:
    `size` ids, and which of them are the answer; an end of text belongs to it.
  """
  writer = sources.writer
  city, number = random.choice(words.CITIES), words.number(random)
  answer = [*writer.encode(f" {number}"), writer.tokenizer.eos_id]
  needles, depths = [needle_text(city, number)], [random.randrange(11) / 10]
  prompt, _ = hide(
    writer, needle_frame(city), size - len(answer), sources.haystack, needles, depths
  )
  return [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)


def several_needles(sources: Sources, random: random_lib.Random, case: Case, size: int) -> Question:
  """LWM's needles: `hidden` numbers at random depths, of which `asked` are asked for.

  The prompt is that of LWM's `scripts/eval_needle_multi.py`.
  """
  cities = random.sample(words.CITIES, sources.hidden)
  numbers = [words.number(random) for _ in cities]
  depths = sorted(random.random() for _ in cities)
  chosen = random.sample(range(sources.hidden), sources.asked)
  names = [cities[index] for index in chosen]
  question = f"What is the special magic number for {names[0]}?"
  if len(names) > 1:
    listed = f"{', '.join(names[:-1])}, and {names[-1]}"
    question = f"What are the special magic numbers for {listed}?"
  texts = [needle_text(city, number) for city, number in zip(cities, numbers)]
  frame = Frame("", f" {question} Don't give information outside the document.")
  prompt, starts = hide(sources.writer, frame, size, sources.haystack, texts, depths)
  facts = {"hidden": dict(zip(cities, numbers)), "cities": names, "starts": starts}
  return Question(prompt, [numbers[index] for index in chosen], facts=facts)


def latent_needle(sources: Sources, random: random_lib.Random, case: Case, size: int) -> Question:
  """A needle that shares no word with its question, as in NoLiMa (arXiv 2502.05167)."""
  assert case.place is not None
  name = random.choice(words.NAMES)
  landmark, country = random.choice(words.LANDMARKS)
  texts = [f"\nActually, {name} lives next to {landmark}.\n"]
  frame = Frame("", f"\nQuestion: Which character has been to {country}? Answer with the name.")
  prompt, starts = hide(sources.writer, frame, size, sources.haystack, texts, [case.place / 100])
  return Question(prompt, [name], facts={"landmark": landmark, "starts": starts})


def nth_needle(sources: Sources, random: random_lib.Random, case: Case, size: int) -> Question:
  """`hidden` needles of one city, of which the one of the case's number is asked for."""
  assert case.place is not None
  city = random.choice(words.CITIES)
  numbers: list[str] = []
  while len(numbers) < sources.hidden:
    numbers = list(dict.fromkeys([*numbers, words.number(random)]))
  depths = sorted(random.random() for _ in numbers)
  question = (
    f"The text gives {sources.hidden} special magic {city} numbers, one after the other. What is "
    f"number {case.place} of them?"
  )
  texts = [needle_text(city, number) for number in numbers]
  prompt, starts = hide(sources.writer, _lwm_frame(question), size, sources.haystack, texts, depths)
  answer = numbers.pop(case.place - 1)
  return Question(prompt, [answer], numbers, facts={"city": city, "starts": starts})


def fill_lines(
  writer: PromptWriter, room: int, make_line: Callable[[], str]
) -> tuple[list[list[int]], int]:
  """As many lines as fit in `room` ids, and how many ids are left."""
  lines: list[list[int]] = []
  while len(line := writer.encode(make_line())) <= room:
    lines.append(line)
    room -= len(line)
  return lines, room


def line_breaks(writer: PromptWriter, count: int) -> list[int]:
  """`count` ids of a line break, to fill the room that whole lines leave."""
  return [writer.encode("a\n")[-1]] * count


def key_value(sources: Sources, random: random_lib.Random, case: Case, size: int) -> Question:
  """The value of one key of a JSON object, as in Lost in the Middle (arXiv 2307.03172)."""
  assert case.place is not None
  writer = sources.writer
  key, value = words.uuid4(random), words.uuid4(random)
  frame = Frame(
    "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    "JSON data:\n{",
    f'}}\n\nKey: "{key}"\nCorresponding value:',
  )

  def line(key: str, value: str) -> str:
    return f'"{key}": "{value}",\n'

  asked = writer.encode(line(key, value))
  others, left = fill_lines(
    writer,
    writer.room(frame, size) - len(asked),
    lambda: line(words.uuid4(random), words.uuid4(random)),
  )
  if left < 0:
    raise UserError(
      f"A key and its value do not fit in a prompt of {size:,} tokens: make --contexts longer."
    )
  place = round(case.place / 100 * len(others))
  lines = [*others[:place], asked, *others[place:]]
  context = [index for line in lines for index in line] + line_breaks(writer, left)
  facts = {"key": key, "pairs": len(lines)}
  return Question(writer.write(frame, context), [value], facts=facts)
