"""Evaluates a model: retrieval from long contexts, films, losses, and generated frames.

    python -m experiments.evaluate needle --workdir=runs/laptop --haystack=novel.txt \\
        --contexts=1024,2048 --depths=0:100:10
    python -m experiments.evaluate several_needles --hidden=4 --asked=2 --workdir=... --haystack=...
    python -m experiments.evaluate ruler --workdir=... --haystack=...
    python -m experiments.evaluate film_clip --workdir=runs/laptop --contexts=4096
    python -m experiments.evaluate harness --workdir=... --tasks=my_task --include_path=tasks
    python -m experiments.evaluate multiple_choice --workdir=... --questions=questions.jsonl
    python -m experiments.evaluate generation --workdir=runs/laptop --samples=16

Answers go to OUTPUT/NAME/answers.jsonl, with heatmap.png and report.html beside them. A run that
was stopped computes only what is missing. docs/evaluation.md describes the evaluations.
"""

import importlib.util
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from experiments import evaluation_inputs, evaluation_run, flags as experiment_flags, inference
from experiments.evaluation_media import generation, multiple_choice, visual_encoder
from experiments.evaluation_run import Options, Run
from lwm import evals, infer
from lwm.errors import UserError
from lwm.evals.answers import Answerer, AnswerFile
from lwm.evals.evaluations import EVALUATIONS, RULER
from lwm.evals.films import Films
from lwm.evals.likelihood import likelihoods
from lwm.evals.losses import by_modality, by_position, position_edges
from lwm.evals.needles import Sources
from lwm.evals.prompts import PromptWriter
from lwm.evals.questions import Case, Question, cases, parse_range
from lwm.evals.requests import Job
from lwm.evals.ruler import THRESHOLD, effective_length

_OPTIONS = Options()
_INPUTS = _OPTIONS.inputs
for _module in (inference, evaluation_inputs, evaluation_run):
  flags.adopt_module_key_flags(_module)
_DEPTHS = flags.DEFINE_string(
  "depths", "0:100:10", "Depths in percent, as START:STOP:STEP or with commas."
)
_ASKED = flags.DEFINE_integer("asked", 1, "Needles that several_needles asks for.", lower_bound=1)
_TASKS = flags.DEFINE_list("tasks", [], "Tasks of the harness.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Directory with tasks of your own.")
_LIMIT = flags.DEFINE_integer("limit", None, "Maximum number of documents per task.")


Record = dict[str, Any]


class Asked:
  """An evaluation with the questions that the flags ask for."""

  def __init__(self, name: str, run: Run, sources: Sources, films: Films | None):
    """Makes some questions of each context, to report errors before the weights are read."""
    self.name, self.evaluation, self._run = name, EVALUATIONS[name], run
    self.answer_tokens = run.answer_tokens(self.evaluation.answer_tokens)
    self._sources = films if self.evaluation.hides_in == "film" else sources
    self.cases = cases(_INPUTS.contexts(), self._places(), run.options.samples)
    self.settings = run.settings(name) | {
      "seed": run.flags.seed,
      "chat": run.options.chat,
      "answer_tokens": self.answer_tokens,
      "temperature": run.flags.text.temperature,
    }
    if self.evaluation.hides_in:
      self.settings["haystack"] = _INPUTS.fingerprint(self.evaluation.hides_in)
    if self.evaluation.has_counts:
      self.settings |= {"hidden": _INPUTS.hidden(), "asked": _ASKED.value}
    # Try every case of the shortest context, because it has the least room, and one case of each
    # other context. Clips have different lengths, so try every case of a film.
    contexts = _INPUTS.contexts()
    tried = [case for case in self.cases if case.context == contexts[0]]
    tried += [next(case for case in self.cases if case.context == other) for other in contexts[1:]]
    for case in self.cases if self.evaluation.hides_in == "film" else tried:
      self.make(case)

  def _places(self) -> list[int | None]:
    if self.evaluation.varies == "depth":
      depths = parse_range(_DEPTHS.value or "", "depths")
      if min(depths) < 0 or max(depths) > 100:
        raise UserError(f"--depths={_DEPTHS.value} are percent: set them between 0 and 100.")
      return [*depths]
    if self.evaluation.varies == "number":
      return [*range(1, _INPUTS.hidden() + 1)]
    return [None]

  def make(self, case: Case) -> Question:
    """The question of a case; its prompt and the longest answer have the case's tokens."""
    random = case.random(self._run.flags.seed, self.name)
    size = case.context - self.answer_tokens
    return self.evaluation.make(self._sources, random, case, size)

  def open(self) -> AnswerFile:
    """The file of the answers, in a directory of the evaluation's name."""
    return AnswerFile(self._run.output / self.name / "answers.jsonl", self.settings)

  def answer(self, answerer: Answerer, file: AnswerFile) -> list[Record]:
    """Answers what has no answer yet, and returns all answers to these questions."""
    total, done = len(self.cases), len(self.cases) - len(file.missing(self.cases))
    if done:
      print(f"{self.name}: {done:,} of {total:,} answers exist")
    started = time.perf_counter()
    for records in evals.answers.run(answerer, file, self.cases, self.make, self.answer_tokens):
      done += len(records)
      score = sum(record["score"] for record in records) / len(records)
      print(
        f"{self.name}: {done:,} of {total:,}, context {records[-1]['context']:,}, score "
        f"{score:.1%}, {time.perf_counter() - started:.1f} s",
        flush=True,
      )
    names = {case.name for case in self.cases}
    return [record for record in file.records if record["case"] in names]

  def report(self, records: list[Record], folder: pathlib.Path) -> None:
    """Writes the heat map and the page, and prints the scores."""
    title, picture = f"{self.name}: {self._run.title}", folder / "heatmap.png"
    evals.report.heat_map(records, title, self.evaluation.varies, picture)
    scores = evals.report.by_context(records)
    rows = [(context, f"{score:.1%}") for context, score in scores.items()]
    sections = {
      "Scores": evals.report.html_table(("context", "mean score"), rows),
      "Heat map": picture,
      "Wrong or incomplete answers": evals.report.mistakes(records),
    }
    evals.report.write_html(folder / "report.html", title, self.settings, sections)
    for context, score in scores.items():
      print(f"{self.name}: context {context:,}: {score:.1%}")
    print(f"{self.name}: {folder / 'report.html'}")


def ask(run: Run, names: Sequence[str]) -> dict[str, dict[int, float]]:
  """Runs evaluations that ask questions; mean scores by evaluation and context."""
  if (_ASKED.value or 1) > _INPUTS.hidden():
    raise UserError(f"--asked={_ASKED.value} is more than --hidden={_INPUTS.hidden()}.")
  writer = PromptWriter(run.checkpoint.tokenizer, run.options.chat)
  hides_in = {EVALUATIONS[name].hides_in for name in names}
  haystack = _INPUTS.haystack(run.checkpoint.tokenizer) if "text" in hides_in else []
  sources = Sources(writer, haystack, _INPUTS.hidden(), _ASKED.value or 1)
  films = _INPUTS.films(run.checkpoint, writer) if "film" in hides_in else None
  asked = [Asked(name, run, sources, films) for name in names]
  files = [one.open() for one in asked]
  answerer = run.answerer()
  scores = {}
  for one, file in zip(asked, files):
    records = one.answer(answerer, file)
    one.report(records, file.path.parent)
    scores[one.name] = evals.report.by_context(records)
  return scores


def ruler(run: Run) -> None:
  """Runs RULER's tasks; their mean gives the effective length."""
  scores, contexts = ask(run, list(RULER)), _INPUTS.contexts()
  means = {
    context: sum(own[context] for own in scores.values()) / len(scores) for context in contexts
  }
  length, page = effective_length(means), run.output / "ruler.html"
  rows = [
    (name, *(f"{own[context]:.1%}" for context in contexts))
    for name, own in [*scores.items(), ("mean", means)]
  ]
  evals.report.write_html(
    page,
    f"RULER: {run.title}",
    {"effective length": f"{length:,} (mean score of at least {THRESHOLD:.1%})"},
    {"Scores": evals.report.html_table(("task", *map(str, contexts)), rows)},
  )
  for context, mean in means.items():
    print(f"ruler: context {context:,}: {mean:.1%}")
  print(f"ruler: effective length {length:,}")
  print(f"ruler: {page}")


def perplexity(run: Run) -> None:
  """The loss by position in windows of the longest context, each after <bos>."""
  context, tokenizer = max(_INPUTS.contexts()), run.checkpoint.tokenizer
  count = run.options.samples
  ids = _INPUTS.haystack(tokenizer, count * context)
  settings = run.settings("perplexity") | {
    "context": context,
    "haystack": _INPUTS.fingerprint("text"),
  }
  file = AnswerFile(run.output / "perplexity" / "losses.jsonl", settings)
  edges = position_edges(context)
  missing = file.missing([Case(context, None, sample) for sample in range(count)])
  engine = run.answerer().engine
  for case in missing:
    window = [tokenizer.bos_id, *ids[case.sample * context : (case.sample + 1) * context]]
    (own,) = likelihoods(engine, [window])
    file.add([{"case": case.name, "losses": by_position(own.loss, edges)}])
    print(f"perplexity: window {case.sample + 1:,} of {count:,}", flush=True)
  windows = [record["losses"] for record in file.records[:count]]
  losses = [sum(column) / len(windows) for column in zip(*windows)]
  folder = file.path.parent
  picture, page = folder / "positions.png", folder / "report.html"
  evals.report.plot_loss_by_position(edges, losses, f"loss by position: {run.title}", picture)
  rows = [
    (f"{first:,} to {stop:,}", f"{loss:.4f}", f"{math.exp(loss):.3f}")
    for first, stop, loss in zip(edges, edges[1:], losses)
  ]
  table = evals.report.html_table(("positions", "loss (nats per token)", "perplexity"), rows)
  evals.report.write_html(
    page, f"Loss by position: {run.title}", settings, {"Losses": table, "Plot": picture}
  )
  for row in rows:
    print("perplexity: positions {}: loss {}, perplexity {}".format(*row))
  print(f"perplexity: {page}")


def held_out_loss(run: Run) -> None:
  """The loss of each modality on validation documents, each cut at the longest context."""
  context, text_vocab_size = max(_INPUTS.contexts()), run.checkpoint.text_vocab_size
  datasets = _INPUTS.datasets(run.checkpoint)
  settings = run.settings("held_out_loss") | {"context": context, "datasets": list(datasets)}
  file = AnswerFile(run.output / "held_out_loss" / "losses.jsonl", settings)
  done = {record["case"] for record in file.records}
  engine: infer.Engine = run.answerer().engine
  rows = []
  for name, split, entropy in datasets.values():
    count = min(len(split), run.options.samples)
    for document in range(count):
      if f"{name}/{document}" in done:
        continue
      tokens, mask = split.read(document, 0, min(int(split.lengths[document]), context))
      (own,) = likelihoods(engine, [tokens.tolist()])
      sums = by_modality(own, tokens, mask, text_vocab_size)
      file.add([{"case": f"{name}/{document}", "dataset": name, **sums}])
    own_records = [record for record in file.records if record["dataset"] == name][:count]
    for modality in ("text", "vision"):
      targets = sum(record[f"{modality}_targets"] for record in own_records)
      if targets:
        loss = sum(record[f"{modality}_loss"] for record in own_records) / targets
        rows.append((name, modality, f"{loss:.4f}", f"{entropy[modality]:.4f}", targets))
        print(
          f"held_out_loss: {name}, {modality}: loss {loss:.4f}, unigram entropy "
          f"{entropy[modality]:.4f}, {targets:,} targets",
          flush=True,
        )
  page = file.path.parent / "report.html"
  header = ("dataset", "modality", "loss (nats per target)", "unigram entropy", "targets")
  table = evals.report.html_table(header, rows)
  evals.report.write_html(page, f"Held-out loss: {run.title}", settings, {"Losses": table})
  print(f"held_out_loss: {page}")


def harness(run: Run) -> None:
  """Runs tasks of lm-evaluation-harness."""
  job = _job(run, "lm_eval", "harness", "pip install -c pins.txt '.[eval]'")
  from lwm.evals.harness import HarnessModel, evaluate_tasks

  print(evaluate_tasks(job, lambda: HarnessModel(run.requests())))
  print(f"harness: {job.path}")


def lmms(run: Run) -> None:
  """Runs tasks of lmms-eval."""
  job = _job(run, "lmms_eval", "lmms", "pip install --no-deps lmms-eval")
  from lwm.evals.lmms import LmmsModel, evaluate_tasks

  writer = PromptWriter(run.checkpoint.tokenizer, run.options.chat)
  encode = visual_encoder(run)
  print(evaluate_tasks(job, lambda: LmmsModel(run.requests(), writer, encode)))
  print(f"lmms: {job.path}")


def _job(run: Run, module: str, name: str, install: str) -> Job:
  """The tasks of the flags. Raises UserError without tasks, or without the harness."""
  if not _TASKS.value:
    raise UserError("Name tasks of the harness with --tasks.")
  if importlib.util.find_spec(module) is None:
    raise UserError(f"The harness {module} is not installed: see docs/evaluation.md ({install}).")
  return Job(_TASKS.value, _INCLUDE_PATH.value, _LIMIT.value, run.output / f"{name}.json")


OTHERS: dict[str, Callable[[Run], None]] = {
  "ruler": ruler,
  "perplexity": perplexity,
  "held_out_loss": held_out_loss,
  "multiple_choice": multiple_choice,
  "generation": generation,
  "harness": harness,
  "lmms": lmms,
}


def main(argv: list[str]) -> None:
  known = [*EVALUATIONS, *OTHERS]
  if len(argv) != 2 or argv[1] not in known:
    raise UserError(f"Name one evaluation: {', '.join(known)}.")
  run = Run(_OPTIONS)
  if argv[1] in OTHERS:
    OTHERS[argv[1]](run)
  else:
    ask(run, argv[1:])


if __name__ == "__main__":
  experiment_flags.run(main, takes_arguments=True)
