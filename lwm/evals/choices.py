"""Questions of the user's own about images and films, answered with a letter or a few words.

The prompts are LLaVA-1.5's (arXiv 2310.03744). Letters are found in answers as in its
`llava/eval/eval_science_qa.py`, and also in parentheses. The likelihood of letters is MMLU's
measure (arXiv 2009.03300): it needs no answer that obeys the format.

V vocabulary.
"""

import dataclasses
import json
import pathlib
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lwm.data.documents import BadDocument, as_text
from lwm.data.lines import read_lines
from lwm.data.tokenizer import Tokenizer
from lwm.errors import UserError
from lwm.evals.answers import Answerer, AnswerFile
from lwm.evals.prompts import Frame

CHOOSE = "Answer with the option's letter from the given choices directly."
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTERS = string.ascii_uppercase
_LETTER = re.compile(r"\(?([A-Z])(?:[.):\n]|$)")
_SENTENCE = re.compile(r"[Tt]he answer is:? \(?([A-Z])\b")


@dataclasses.dataclass(frozen=True)
class UserQuestion:
  """A question of a file.

  Attributes:
    line: of the file.
    question: text.
    options: texts; none where a word or a phrase is asked for.
    answers: the letter of the right option, or the texts that are right.
    files: films and images that the question is about.
  """

  line: int
  question: str
  options: tuple[str, ...]
  answers: tuple[str, ...]
  files: tuple[str, ...]

  @property
  def frame(self) -> Frame:
    """The question in LLaVA's format; films come before it."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options)]
    text = "\n".join([self.question, *lines, CHOOSE if self.options else SHORT_ANSWER])
    return Frame("", f"\n{text}" if self.files else text)

  def score(self, text: str) -> float:
    """1 for the right letter, or exactly a right text; case and a final period don't matter."""
    if self.options:
      return float(chosen_letter(text, len(self.options)) in self.answers)
    return float(_plain(text) in map(_plain, self.answers))


def _plain(text: str) -> str:
  return text.strip().removesuffix(".").lower()


def chosen_letter(text: str, num_options: int) -> str | None:
  """The letter that an answer chooses: "B", "B. ...", "(B)", or "The answer is B"; None if none."""
  text = text.strip()
  match = _LETTER.match(text) or _SENTENCE.search(text)
  return match[1] if match and match[1] in LETTERS[:num_options] else None


def read_questions(path: pathlib.Path) -> list[UserQuestion]:
  """The questions of a file of JSON lines.

  A line has the fields `question`; `options`, a list of texts, or nothing for a short answer;
  `answer`, a letter or the text of an option, or a text or a list of texts; and `file`, a film or
  an image or a list of these, relative to the directory of the questions, or nothing.

  Raises:
    UserError: the file cannot be read, or a line is not such a question.
  """
  questions = []
  for number, line in read_lines(path, "questions"):
    try:
      questions.append(_question(number, json.loads(line), path.parent))
    except (ValueError, BadDocument) as error:
      raise UserError(f"{path}, line {number}, is not a question: {error}.") from error
  return questions


def _question(line: int, record: Any, folder: pathlib.Path) -> UserQuestion:
  if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
    raise BadDocument("it has no fields question and answer")
  options, answers = _texts(record, "options"), _texts(record, "answer")
  if options:
    if not 2 <= len(options) <= len(LETTERS):
      raise BadDocument(f"it has {len(options)} options, not 2 to {len(LETTERS)}")
    pairs = list(zip(LETTERS, options))
    right = [letter for letter, option in pairs if [letter] == answers or [option] == answers]
    if len(right) != 1:
      raise BadDocument("its answer is not one of the letters or one of the options")
    answers = right
  files = [str(folder / file) for file in _texts(record, "file")]
  text = as_text(record["question"], "the question")
  return UserQuestion(line, text, tuple(options), tuple(answers), tuple(files))


def _texts(record: dict[str, Any], name: str) -> list[str]:
  """The texts of a field with one text, several, or none."""
  value = record.get(name)
  values = value if isinstance(value, list) else [] if value is None else [value]
  return [as_text(text, f"the field {name}") for text in values]


def letter_ids(tokenizer: Tokenizer, num_options: int) -> list[list[int]]:
  """The ids with which each letter may come, with and without a space before it."""
  return [
    sorted({tokenizer.encode(text)[-1] for text in (letter, f" {letter}")})
    for letter in LETTERS[:num_options]
  ]


def letter_probabilities(logits_V: np.ndarray, ids: Sequence[Sequence[int]]) -> list[float]:
  """The probability of each letter as the next token, relative to all letters together."""
  each = np.array([np.logaddexp.reduce(logits_V[list(own)].astype(np.float64)) for own in ids])
  return [float(value) for value in np.exp(each - np.logaddexp.reduce(each))]


def ask(
  answerer: Answerer,
  file: AnswerFile,
  questions: Sequence[UserQuestion],
  prompts: Sequence[Sequence[int]],
  answer_tokens: int,
) -> Iterator[list[dict[str, Any]]]:
  """Answers the questions that have no answer in the file, and adds the answers to it.

  Args:
    answerer: of the model.
    file: of the answers.
    questions: all of them.
    prompts: the ids of each question.
    answer_tokens: most tokens of an answer.

  Yields:
    The new records, batch by batch.
  """
  done = {record["case"] for record in file.records}
  missing = [pair for pair in zip(questions, prompts) if str(pair[0].line) not in done]
  # Questions about one film are answered together, because the beginning of rows is read once.
  missing.sort(key=lambda pair: (pair[0].files, pair[0].line))
  for first in range(0, len(missing), answerer.rows):
    batch = missing[first : first + answerer.rows]
    session = answerer.open([prompt for _, prompt in batch], answer_tokens)
    logits_RxV = jax.device_get(session.state.logits_RxV)
    texts = answerer.generate(session, answer_tokens)
    records = []
    for (question, prompt), logits_V, text in zip(batch, logits_RxV, texts):
      record = {
        "case": str(question.line),
        **dataclasses.asdict(question),
        "prompt_tokens": len(prompt),
        "text": text,
        "score": question.score(text),
      }
      if question.options:
        ids = letter_ids(answerer.tokenizer, len(question.options))
        chances = letter_probabilities(logits_V, ids)
        likeliest = LETTERS[int(np.argmax(chances))]
        record["letters"] = dict(zip(LETTERS, chances))
        record["likeliest_score"] = float(likeliest in question.answers)
      records.append(record)
    file.add(records)
    yield records


class Score(NamedTuple):
  """How one kind of question was answered.

  Attributes:
    name: of the kind.
    questions: their number.
    exact_match: mean score of the answers.
    likeliest: mean score of the likeliest letters; None where no letter is asked for.
    chance: mean score of a random letter, likewise.
  """

  name: str
  questions: int
  exact_match: float
  likeliest: float | None
  chance: float | None


def summary(records: Sequence[dict[str, Any]]) -> list[Score]:
  """The scores of each kind of question."""
  scores = []
  lettered = [record for record in records if record["options"]]
  if lettered:
    exact, likeliest, chance = (
      float(np.mean(values))
      for values in (
        [record["score"] for record in lettered],
        [record["likeliest_score"] for record in lettered],
        [1 / len(record["options"]) for record in lettered],
      )
    )
    scores.append(Score("option's letter", len(lettered), exact, likeliest, chance))
  short = [record["score"] for record in records if not record["options"]]
  if short:
    scores.append(Score("word or phrase", len(short), float(np.mean(short)), None, None))
  return scores
