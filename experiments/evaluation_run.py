"""What all evaluations of `experiments.evaluate` share: its flags, and the model before and after
its weights are read.
"""

import pathlib
from typing import Any

from absl import flags

from experiments import evaluation_inputs, inference
from lwm.evals.answers import Answerer
from lwm.evals.requests import Requests

FLAGS = inference.Flags()
INPUTS = evaluation_inputs.Inputs()
_SAMPLES = flags.DEFINE_integer(
  "samples", 1, "Questions per context and depth; windows; documents; clips.", lower_bound=1
)
_CHAT = flags.DEFINE_bool("chat", False, "Ask in the tokenizer's chat template.")
_ROWS = flags.DEFINE_integer(
  "rows", None, "Questions at a time. Default: one per replica of the model.", lower_bound=1
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the results. Default: WORKDIR/evals.")

# Answers are the likeliest tokens unless flags say otherwise, and each evaluation has its longest.
flags.FLAGS.set_default("temperature", 0.0)
flags.FLAGS.set_default("num_tokens", None)


class Run:
  """What all evaluations of a program share.

  Attributes:
    checkpoint: the model, before its weights are read.
    output: directory of the results.
    title: names the model.
    samples: --samples.
    chat: --chat.
  """

  def __init__(self) -> None:
    """Raises UserError if films cannot be read, or a cache does not fit in memory."""
    INPUTS.check_films()
    self.checkpoint = inference.Checkpoint(FLAGS)
    self.checkpoint.check_cache(_ROWS.value or 1, INPUTS.contexts()[-1])
    self.output = pathlib.Path(_OUTPUT.value or self.checkpoint.workdir / "evals")
    self.title = self.checkpoint.workdir.name
    self.samples, self.chat = _SAMPLES.value or 1, bool(_CHAT.value)

  def settings(self, name: str) -> dict[str, Any]:
    """The settings of every evaluation, for the first line of its answers."""
    return {
      "evaluation": name,
      "model": self.checkpoint.stored.identity,
      "weights": FLAGS.weights,
      "cache": FLAGS.cache,
    }

  def answer_tokens(self, default: int) -> int:
    """Most tokens of an answer: --num_tokens, or an evaluation's own."""
    return flags.FLAGS["num_tokens"].value or default

  def answerer(self) -> Answerer:
    """Reads the weights."""
    engine = self.checkpoint.engine(self.checkpoint.load())
    rows = engine.padded(_ROWS.value or 1)
    return Answerer(engine, self.checkpoint.tokenizer, self.checkpoint.text(), rows)

  def requests(self) -> Requests:
    """Reads the weights, for a harness."""
    return Requests(self.answerer(), INPUTS.contexts()[-1])
