"""Measures what a model finds in long contexts.

    python -m experiments.evaluate needle --workdir=runs/laptop --haystack=novel.txt \\
        --contexts=1024,2048 --depths=0:100:10
    python -m experiments.evaluate several_needles --hidden=4 --asked=2 --workdir=... --haystack=...
    python -m experiments.evaluate ruler --workdir=... --haystack=...

Evaluations: needle, several_needles, latent_needle, nth_needle, key_value; RULER's niah_* tasks,
variable_tracking, common_words and frequent_words, or all of them as ruler. Answers go to
OUTPUT/NAME/answers.jsonl, with heatmap.png and report.html beside them. A run that was stopped
computes only what is missing. docs/evaluation.md describes the evaluations.
"""

import pathlib
import time
from collections.abc import Sequence

from absl import flags

from experiments import flags as experiment_flags, inference
from lwm import evals
from lwm.data.tokenizer import file_sha256
from lwm.errors import UserError
from lwm.evals.answers import Answerer, AnswerFile
from lwm.evals.evaluations import EVALUATIONS, RULER, Evaluation
from lwm.evals.needles import Sources
from lwm.evals.prompts import Haystack, PromptWriter
from lwm.evals.questions import Case, Question, cases, parse_range
from lwm.evals.ruler import THRESHOLD, effective_length

flags.adopt_module_key_flags(inference)
_HAYSTACK = flags.DEFINE_list("haystack", [], "UTF-8 texts that hide needles.")
_CONTEXTS = flags.DEFINE_list(
  "contexts", ["1024", "2048"], "Tokens of the prompt and of the longest answer together."
)
_DEPTHS = flags.DEFINE_string(
  "depths", "0:100:10", "Depths in percent, as START:STOP:STEP or with commas."
)
_SAMPLES = flags.DEFINE_integer("samples", 1, "Questions per context and depth.", lower_bound=1)
_HIDDEN = flags.DEFINE_integer("hidden", 4, "Needles that are hidden.", lower_bound=1)
_ASKED = flags.DEFINE_integer("asked", 1, "Needles that several_needles asks for.", lower_bound=1)
_CHAT = flags.DEFINE_bool("chat", False, "Ask in the tokenizer's chat template.")
_ROWS = flags.DEFINE_integer(
  "rows", None, "Questions at a time. Default: one per replica of the model.", lower_bound=1
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the results. Default: WORKDIR/evals.")

# Answers are the likeliest tokens unless flags say otherwise, and each evaluation has its longest.
flags.FLAGS.set_default("temperature", 0.0)
flags.FLAGS.set_default("num_tokens", None)


class Asked:
  """An evaluation with the questions that the flags ask for."""

  def __init__(self, name: str, writer: PromptWriter, identity: str, haystack: Sequence[int]):
    """Makes one question of each context, so that what is wrong is known at once."""
    self.name, self.evaluation = name, EVALUATIONS[name]
    self.answer_tokens = flags.FLAGS["num_tokens"].value or self.evaluation.answer_tokens
    self._sources = Sources(writer, haystack, _HIDDEN.value or 1, _ASKED.value or 1)
    self.cases = cases(contexts(), self._places(), _SAMPLES.value or 1)
    self.settings = {
      "evaluation": name,
      "model": identity,
      "seed": inference.seed(),
      "chat": bool(_CHAT.value),
      "answer_tokens": self.answer_tokens,
      "temperature": flags.FLAGS["temperature"].value,
    }
    if self.evaluation.needs_haystack:
      self.settings["haystack"] = {path: file_sha256(path)[:16] for path in _HAYSTACK.value}
    if self.evaluation.has_counts:
      self.settings |= {"hidden": self._sources.hidden, "asked": self._sources.asked}
    for context in contexts():
      self.make(next(case for case in self.cases if case.context == context))

  def _places(self) -> list[int | None]:
    if self.evaluation.varies == "depth":
      depths = parse_range(_DEPTHS.value or "", "depths")
      if min(depths) < 0 or max(depths) > 100:
        raise UserError(f"--depths={_DEPTHS.value} are percent: set them between 0 and 100.")
      return [*depths]
    if self.evaluation.varies == "number":
      return [*range(1, self._sources.hidden + 1)]
    return [None]

  def make(self, case: Case) -> Question:
    """The question of a case; its prompt and the longest answer have the case's tokens."""
    random = case.random(inference.seed(), self.name)
    size = case.context - self.answer_tokens
    question = self.evaluation.make(self._sources, random, case, size)
    assert len(question.prompt) == size
    return question

  def run(self, answerer: Answerer, folder: pathlib.Path) -> list[evals.report.Record]:
    """Answers what has no answer yet, and returns all answers of these cases."""
    file = AnswerFile(folder / "answers.jsonl", self.settings)
    total = len(self.cases)
    done = total - len(file.missing(self.cases))
    if done:
      print(f"{self.name}: {done:,} of {total:,} answers exist")
    started = time.perf_counter()
    for records in evals.answers.run(answerer, file, self.cases, self.make, self.answer_tokens):
      done += len(records)
      score = sum(record["score"] for record in file.records) / len(file.records)
      print(
        f"{self.name}: {done:,} of {total:,}, context {records[-1]['context']:,}, mean score so "
        f"far {score:.1%}, {time.perf_counter() - started:.1f} s",
        flush=True,
      )
    names = {case.name for case in self.cases}
    return [record for record in file.records if record["case"] in names]

  def report(self, records: list[evals.report.Record], folder: pathlib.Path) -> None:
    """Writes the heat map and the page, and prints the scores."""
    title = f"{self.name}: {pathlib.Path(flags.FLAGS['workdir'].value).name}"
    picture = folder / "heatmap.png"
    evals.report.heat_map(records, title, self.evaluation.varies, picture)
    scores = evals.report.by_context(records)
    rows = [(context, f"{score:.1%}") for context, score in scores.items()]
    evals.report.write_html(
      folder / "report.html",
      title,
      self.settings,
      {
        "Scores": evals.report.html_table(("context", "mean score"), rows),
        "Heat map": picture,
        "Answers that are not all right": evals.report.mistakes(records),
      },
    )
    for context, score in scores.items():
      print(f"{self.name}: context {context:,}: {score:.1%}")
    print(f"{self.name}: {folder / 'report.html'}")


def contexts() -> list[int]:
  return sorted(set(parse_range(",".join(_CONTEXTS.value or []), "contexts")))


def read_haystack(evaluations: Sequence[Evaluation], writer: PromptWriter) -> list[int]:
  """The text that the evaluations need."""
  if not any(evaluation.needs_haystack for evaluation in evaluations):
    return []
  if not _HAYSTACK.value:
    raise UserError("Needles need a text that hides them: name files with --haystack.")
  return Haystack(_HAYSTACK.value, writer.tokenizer, max(contexts())).ids


def report_ruler(scores: dict[str, dict[int, float]], folder: pathlib.Path) -> None:
  """Writes the mean over RULER's tasks, and the effective length."""
  means = {
    context: sum(own[context] for own in scores.values()) / len(scores) for context in contexts()
  }
  length = effective_length(means)
  rows = [(name, *(f"{own[c]:.1%}" for c in contexts())) for name, own in scores.items()]
  rows.append(("mean", *(f"{means[context]:.1%}" for context in contexts())))
  header = ("task", *(f"{context:,}" for context in contexts()))
  evals.report.write_html(
    folder / "ruler.html",
    "RULER",
    {"effective length": f"{length:,} (mean score of at least {THRESHOLD:.1%})"},
    {"Scores": evals.report.html_table(header, rows)},
  )
  for context, mean in means.items():
    print(f"ruler: context {context:,}: {mean:.1%}")
  print(f"ruler: effective length {length:,}")
  print(f"ruler: {folder / 'ruler.html'}")


def names_of(argv: list[str]) -> list[str]:
  """The evaluations that the first argument names."""
  known = [*EVALUATIONS, "ruler"]
  if len(argv) != 2 or argv[1] not in known:
    raise UserError(f"Name one evaluation before the flags: {', '.join(known)}.")
  return list(RULER) if argv[1] == "ruler" else [argv[1]]


def main(argv: list[str]) -> None:
  names = names_of(argv)
  if (_ASKED.value or 1) > (_HIDDEN.value or 1):
    raise UserError(f"--asked={_ASKED.value} is more than --hidden={_HIDDEN.value}.")
  checkpoint = inference.Checkpoint()
  writer = PromptWriter(checkpoint.tokenizer, bool(_CHAT.value))
  haystack = read_haystack([EVALUATIONS[name] for name in names], writer)
  asked = [Asked(name, writer, checkpoint.stored.identity, haystack) for name in names]
  engine = checkpoint.engine(checkpoint.load())
  rows = engine.padded(_ROWS.value or 1)
  answerer = Answerer(engine, checkpoint.tokenizer, checkpoint.text(), rows)
  output = pathlib.Path(_OUTPUT.value or checkpoint.workdir / "evals")
  scores = {}
  for one in asked:
    records = one.run(answerer, output / one.name)
    one.report(records, output / one.name)
    scores[one.name] = evals.report.by_context(records)
  if argv[1] == "ruler":
    report_ruler(scores, output)


if __name__ == "__main__":
  experiment_flags.run(main, takes_arguments=True)
