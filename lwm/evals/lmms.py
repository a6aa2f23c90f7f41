"""A checkpoint as a model of lmms-eval: tasks about images and films.

This module needs lmms-eval, which brings PyTorch; nothing imports it unless it is asked for.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import make_table

from lwm.errors import UserError
from lwm.evals.prompts import Frame, PromptWriter
from lwm.evals.requests import Job, Requests

# Makes the ids of a document's images and films, which are PIL images and paths.
Encode = Callable[[Sequence[Any]], list[int]]


class LmmsModel(lmms):
  """Answers lmms-eval's requests; the images and films of a document come before its text."""

  def __init__(self, requests: Requests, writer: PromptWriter, encode: Encode):
    super().__init__()
    self._requests, self._writer, self._encode = requests, writer, encode
    self._vision: dict[tuple[str, str, int], list[int]] = {}

  def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
    """For each continuation, its loss, and whether it is the greedy one.

    The loss is the mean in nats per token. lmms-eval's own models return it too, in spite of the
    method's name, and its multiple choice takes the continuation with the lowest value.
    """
    pairs = []
    for context, target, to_visual, document, task, split in (request.args for request in requests):
      if not isinstance(target, str):
        target = target(self.task_dict[task][split][document])
      prompt = self._prompt(context, to_visual, (task, split, document))
      pairs.append((prompt, self._writer.encode(target)))
    found = self._requests.likelihoods(pairs)
    # The evaluator of version 0.7.3 would turn a bare pair into a text, and fail.
    return [
      GenerationResult((float(own.loss.mean()), bool(own.is_likeliest.all()))) for own in found
    ]

  def generate_until(self, requests: list[Instance]) -> list[str]:
    """The greedy continuation of each context, up to the texts that end it."""
    prompts = [
      self._prompt(context, to_visual, (task, split, document))
      for context, _, to_visual, document, task, split in (request.args for request in requests)
    ]
    return self._requests.generate(prompts, [request.args[1] for request in requests])

  def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
    raise UserError(
      "A task has several rounds, but this adapter answers once: choose another task."
    )

  def _prompt(
    self, text: str, to_visual: Callable[[Any], Sequence[Any] | None], key: tuple[str, str, int]
  ) -> list[int]:
    """The ids of a document's images and films, and of a text after them.

    Args:
      text: of the request.
      to_visual: finds the images and films of a document.
      key: the document's task, split and index. Its requests share what is encoded.
    """
    if key not in self._vision:
      task, split, document = key
      visuals = to_visual(self.task_dict[task][split][document])
      self._vision[key] = self._encode(visuals) if visuals else []
    vision = self._vision[key]
    return self._writer.write(Frame("", f"\n{text}" if vision else text), vision)


def evaluate_tasks(job: Job, make_model: Callable[[], LmmsModel]) -> str:
  """Runs tasks, and returns a table of the results; see `Job.run`."""
  return make_table(
    job.run(simple_evaluate, TaskManager(include_path=job.include_path), make_model)
  )
