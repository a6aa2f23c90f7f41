"""Requests of evaluation harnesses, answered with an engine: likelihoods and greedy continuations.

A prompt that is too long is an error: the harnesses' own models cut it, and score the rest.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lwm.errors import UserError
from lwm.evals.answers import Answerer
from lwm.evals.likelihood import Likelihood, likelihoods

# Tokens of an answer where a task does not say how many.
_MOST_NEW_TOKENS = 256


class Generation(NamedTuple):
  """How an answer ends.

  Attributes:
    max_tokens: of the answer.
    until: texts that end it; they and what follows them are left out.
  """

  max_tokens: int
  until: tuple[str, ...]

  @classmethod
  def of(cls, settings: dict[str, Any]) -> "Generation":
    """The settings of a task. Raises UserError if the task does not decode greedily."""
    is_sampled = settings.get("do_sample") and settings.get("temperature", 1) > 0
    if is_sampled or settings.get("num_beams", 1) > 1:
      raise UserError(
        "A task asks for sampled answers or beam search, but this adapter decodes greedily: choose "
        "another task."
      )
    until = settings.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    # The first name is lm-evaluation-harness's, the second lmms-eval's.
    length = settings.get("max_gen_toks", settings.get("max_new_tokens", _MOST_NEW_TOKENS))
    return cls(int(length), until)


class Requests:
  """Answers requests, batch by batch, with similar lengths in a batch."""

  def __init__(self, answerer: Answerer, max_length: int):
    """
    Args:
      answerer: of the model.
      max_length: tokens of the longest prompt with its answer.
    """
    self.answerer, self.max_length = answerer, max_length

  def likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
    """The likelihoods of the tokens of each continuation after its context.

    Args:
      pairs: ids of a context, at least one, and of a continuation.

    Raises:
      UserError: a pair is longer than `max_length`.
    """
    lengths = [len(context) + len(continuation) for context, continuation in pairs]
    self._check(lengths)
    results: dict[int, Likelihood] = {}
    order = sorted(range(len(pairs)), key=lambda index: -lengths[index])
    for batch in self._batches(order):
      rows = [[*pairs[index][0], *pairs[index][1]] for index in batch]
      rows += rows[:1] * (self.answerer.rows - len(rows))
      for index, found in zip(batch, likelihoods(self.answerer.engine, rows)):
        own = slice(len(found.loss) - len(pairs[index][1]), None)
        results[index] = Likelihood(found.loss[own], found.is_likeliest[own])
    return [results[index] for index in range(len(pairs))]

  def generate(
    self, prompts: Sequence[Sequence[int]], settings: Sequence[dict[str, Any]]
  ) -> list[str]:
    """The greedy continuation of each prompt.

    Args:
      prompts: ids.
      settings: of each one's task; see `Generation.of`.

    Raises:
      UserError: a prompt with its answer is longer than `max_length`, or settings cannot be met.
    """
    generations = [Generation.of(own) for own in settings]
    self._check([len(row) + own.max_tokens for row, own in zip(prompts, generations)])
    texts: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda index: (generations[index], len(prompts[index])))
    for generation, same in itertools.groupby(order, key=lambda index: generations[index]):
      for batch in self._batches(list(same)):
        answers = self.answerer.answer([prompts[index] for index in batch], *generation)
        texts |= zip(batch, answers)
    return [texts[index] for index in range(len(prompts))]

  def _check(self, lengths: Sequence[int]) -> None:
    if max(lengths, default=0) > self.max_length:
      raise UserError(
        f"A prompt of the task has {max(lengths):,} tokens with its answer, more than the "
        f"{self.max_length:,} of --contexts: make --contexts longer; prompts are never cut."
      )

  def _batches(self, indices: list[int]) -> Iterator[list[int]]:
    for first in range(0, len(indices), self.answerer.rows):
      yield indices[first : first + self.answerer.rows]


@dataclasses.dataclass(frozen=True)
class Job:
  """Tasks of a harness to run.

  Attributes:
    tasks: names.
    include_path: directory with tasks of your own.
    limit: most documents per task.
    path: of the JSON file with the results and every answer.
  """

  tasks: Sequence[str]
  include_path: str | None
  limit: int | None
  path: pathlib.Path

  def run(
    self, evaluate: Callable[..., Any], manager: Any, make_model: Callable[[], Any]
  ) -> dict[str, Any]:
    """Runs the tasks, and returns the harness's results.

    Args:
      evaluate: the harness's `simple_evaluate`.
      manager: its TaskManager, with the tasks of `include_path`.
      make_model: reads the model's weights; called when all tasks are known.

    Raises:
      UserError: a task does not exist, or a prompt is too long.
    """
    for task in self.tasks:
      if not manager.match_tasks([task]):
        raise UserError(f"The harness has no task {task}: correct --tasks or --include_path.")
    results = evaluate(
      model=make_model(),
      tasks=list(self.tasks),
      limit=self.limit,
      task_manager=manager,
      bootstrap_iters=0,
    )
    kept = {name: results[name] for name in ("results", "versions", "n-samples", "samples")}
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self.path.write_text(json.dumps(kept, default=str, ensure_ascii=False, indent=1), "utf-8")
    return results
