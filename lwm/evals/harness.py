"""A checkpoint as a model of lm-evaluation-harness.

This module needs the extra `eval`; nothing imports it unless the harness is asked for.
"""

import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from lwm.errors import UserError
from lwm.evals.answers import Answerer
from lwm.evals.likelihood import likelihoods

# Tokens of an answer where a task does not say how many.
_MOST_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
  """Answers the harness's requests with an engine.

  A prompt that is longer than `max_length` is an error: the harness's other models cut it, and
  score what is left.
  """

  def __init__(self, answerer: Answerer, max_length: int):
    """
    Args:
      answerer: of the model.
      max_length: tokens of the longest prompt with its answer.
    """
    super().__init__()
    self._answerer, self._tokenizer = answerer, answerer.tokenizer
    self.max_length = max_length

  @property
  def eot_token_id(self) -> int:
    return self._tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    return self._tokenizer.bos_id

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """The ids of a text, after <bos> unless `add_special_tokens` is False."""
    ids = self._tokenizer.encode(string)
    return ids if add_special_tokens is False else [self._tokenizer.bos_id, *ids]

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """The log-likelihood of each text after <bos>."""
    pairs = []
    for (text,) in (request.args for request in requests):
      ids = self.tok_encode(text, add_special_tokens=False)
      pairs.append((("", text), [self.prefix_token_id], ids))
    return [total for total, _ in self._loglikelihood_tokens(pairs)]

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """For each context and continuation, the log-likelihood, and whether it is the greedy one."""
    for _, context, continuation in requests:
      self._check(len(context) + len(continuation))
    results: dict[int, tuple[float, bool]] = {}
    order = sorted(range(len(requests)), key=lambda index: -sum(map(len, requests[index][1:])))
    for batch in _batches(order, self._answerer.rows):
      rows = [[*requests[index][1], *requests[index][2]] for index in batch]
      rows += rows[:1] * (self._answerer.rows - len(rows))
      for index, likelihood in zip(batch, likelihoods(self._answerer.engine, rows)):
        own = slice(len(likelihood.loss) - len(requests[index][2]), None)
        total = -float(likelihood.loss[own].sum())
        results[index] = total, bool(likelihood.is_likeliest[own].all())
    return [results[index] for index in range(len(requests))]

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """The greedy continuation of each context, up to the texts that end it."""
    prompts = [self.tok_encode(request.args[0]) for request in requests]
    settings = [_generation(request.args[1]) for request in requests]
    for prompt, (max_tokens, _) in zip(prompts, settings):
      self._check(len(prompt) + max_tokens)
    texts: dict[int, str] = {}
    order = sorted(range(len(requests)), key=lambda index: (settings[index], len(prompts[index])))
    for (max_tokens, until), same in itertools.groupby(order, key=lambda index: settings[index]):
      for batch in _batches(list(same), self._answerer.rows):
        answers = self._answerer.answer([prompts[index] for index in batch], max_tokens, until)
        texts |= zip(batch, answers)
    return [texts[index] for index in range(len(requests))]

  def _check(self, tokens: int) -> None:
    if tokens > self.max_length:
      raise UserError(
        f"A prompt of the task has {tokens:,} tokens with its answer, more than the "
        f"{self.max_length:,} of --contexts: make --contexts longer; prompts are never cut."
      )


def _generation(settings: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
  """The most tokens of an answer, and the texts that end it."""
  if settings.get("do_sample") and settings.get("temperature", 1) > 0:
    raise UserError("A task asks for sampled answers, and this adapter's are the likeliest ones.")
  until = settings.get("until") or ()
  until = (until,) if isinstance(until, str) else tuple(until)
  return int(settings.get("max_gen_toks", _MOST_NEW_TOKENS)), until


def _batches(indices: list[int], size: int) -> Iterator[list[int]]:
  for first in range(0, len(indices), size):
    yield indices[first : first + size]


def evaluate_tasks(
  answerer: Answerer,
  tasks: Sequence[str],
  *,
  max_length: int,
  include_path: str | None,
  limit: int | None,
  path: pathlib.Path,
) -> str:
  """Runs tasks, writes their results and every answer to a JSON file, and returns a table.

  Args:
    answerer: of the model.
    tasks: names.
    max_length: see `HarnessModel`.
    include_path: directory with tasks of your own.
    limit: most documents per task.
    path: of the JSON file.

  Raises:
    UserError: a task does not exist, or a prompt is too long.
  """
  manager = TaskManager(include_path=include_path)
  unknown = [task for task in tasks if not manager.match_tasks([task])]
  if unknown:
    raise UserError(f"The harness has no task {unknown[0]}: see --tasks and --include_path.")
  results: Any = lm_eval.simple_evaluate(
    model=HarnessModel(answerer, max_length),
    tasks=list(tasks),
    limit=limit,
    task_manager=manager,
    bootstrap_iters=0,
  )
  kept = {name: results[name] for name in ("results", "versions", "n-samples", "samples")}
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(kept, default=str, ensure_ascii=False, indent=1), "utf-8")
  return make_table(results)
