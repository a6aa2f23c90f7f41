"""A model's answers, one line of JSON each, in a file that a killed run resumes from."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lwm import infer
from lwm.data.tokenizer import Tokenizer
from lwm.errors import UserError
from lwm.evals.questions import Case, Question


class AnswerFile:
  """The answers of one evaluation.

  The first line has the settings, so that answers to other questions are never mixed with these.

  Attributes:
    records: the answers, in the order in which they were computed.
  """

  def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
    """Reads the answers that exist, or begins a file.

    Raises:
      UserError: the file has answers to other questions or of another model, or is damaged.
    """
    self.path = path
    self.records: list[dict[str, Any]] = []
    settings = json.loads(json.dumps(settings))
    if path.exists():
      # A run that was killed while it wrote has left part of a line.
      whole = path.read_bytes().rpartition(b"\n")[0]
      try:
        lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
      except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it.") from error
      if lines:
        header, *self.records = lines
        changed = [name for name in settings if header.get(name) != settings[name]]
        if changed:
          raise UserError(
            f"{path} has answers with another {' and '.join(changed)}: name another directory with "
            "--output, or remove it."
          )
        path.write_bytes(whole + b"\n")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, ensure_ascii=False) + "\n", "utf-8")

  def add(self, records: Sequence[dict[str, Any]]) -> None:
    self.records += records
    with self.path.open("a", encoding="utf-8") as file:
      file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

  def missing(self, cases: Sequence[Case]) -> list[Case]:
    """The cases that have no answer yet."""
    done = {record["case"] for record in self.records}
    return [case for case in cases if case.name not in done]


@dataclasses.dataclass(frozen=True)
class Answerer:
  """Answers questions, many at a time.

  Attributes:
    engine: generates.
    tokenizer: of the model.
    grammar: how tokens are drawn.
    rows: how many questions are answered at a time.
  """

  engine: infer.Engine
  tokenizer: Tokenizer
  grammar: infer.Grammar
  rows: int

  def answer(
    self, prompts: Sequence[Sequence[int]], max_tokens: int, until: Sequence[str] = ()
  ) -> list[str]:
    """The answers to at most `rows` prompts; see `generate`."""
    return self.generate(self.open(prompts, max_tokens), max_tokens, until)[: len(prompts)]

  def open(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> infer.Session:
    """A session that has read at most `rows` prompts, and has room for `max_tokens` after each."""
    # Programs are compiled for `rows` rows, so fill up with copies.
    prompts = [*prompts, *[prompts[0]] * (self.rows - len(prompts))]
    return self.engine.open(prompts, max(map(len, prompts)) + max_tokens)

  def generate(
    self, session: infer.Session, max_tokens: int, until: Sequence[str] = ()
  ) -> list[str]:
    """The texts that follow the rows of a session.

    Args:
      session: of `open`.
      max_tokens: of each answer.
      until: texts that end an answer; they and what follows them are left out.
    """
    answers: list[list[int]] = [[] for _ in session.tokens]
    sampling = infer.Sampling(self.grammar, max_tokens)
    for block in session.generate(sampling, range(len(answers))):
      for answer, tokens in zip(answers, block):
        answer += tokens
      if until and all(any(end in text for end in until) for text in self._texts(answers)):
        break
    texts = self._texts(answers)
    return [min((text.partition(end)[0] for end in until), key=len, default=text) for text in texts]

  def _texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
    stops = self.grammar.stop_ids
    return [
      self.tokenizer.decode([token for token in row if token not in stops]) for row in answers
    ]


def run(
  answerer: Answerer,
  file: AnswerFile,
  cases: Sequence[Case],
  make: Callable[[Case], Question],
  answer_tokens: int,
) -> Iterator[list[dict[str, Any]]]:
  """Answers the cases that have no answer in the file, and adds the answers to it.

  Questions of one context are answered together, because their prompts have the same length.

  Args:
    answerer: of the model.
    file: of the answers.
    cases: all of them.
    make: makes a case's question.
    answer_tokens: most tokens of an answer.

  Yields:
    The new records, batch by batch.
  """
  missing = file.missing(cases)
  for context in sorted({case.context for case in missing}):
    group = [case for case in missing if case.context == context]
    for first in range(0, len(group), answerer.rows):
      batch = group[first : first + answerer.rows]
      questions = [make(case) for case in batch]
      texts = answerer.answer([question.prompt for question in questions], answer_tokens)
      records = [
        {
          "case": case.name,
          **dataclasses.asdict(case),
          "prompt_tokens": len(question.prompt),
          **question.facts,
          "answers": list(question.answers),
          "text": text,
          "score": question.score(text),
        }
        for case, question, text in zip(batch, questions, texts)
      ]
      file.add(records)
      yield records
