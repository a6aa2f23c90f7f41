"""A checkpoint as a model of lm-evaluation-harness.

This module needs the extra `eval`; nothing imports it unless the harness is asked for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from lwm.evals.requests import Job, Requests


class HarnessModel(TemplateLM):
  """Answers the harness's requests."""

  def __init__(self, requests: Requests):
    super().__init__()
    self._requests, self._tokenizer = requests, requests.answerer.tokenizer
    self.max_length = requests.max_length

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
    found = self._requests.likelihoods([request[1:] for request in requests])
    return [(-float(own.loss.sum()), bool(own.is_likeliest.all())) for own in found]

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """The greedy continuation of each context, up to the texts that end it."""
    prompts = [self.tok_encode(request.args[0]) for request in requests]
    return self._requests.generate(prompts, [request.args[1] for request in requests])


def evaluate_tasks(job: Job, make_model: Callable[[], HarnessModel]) -> str:
  """Runs tasks, and returns a table of the results; see `Job.run`."""
  return make_table(
    job.run(lm_eval.simple_evaluate, TaskManager(include_path=job.include_path), make_model)
  )
