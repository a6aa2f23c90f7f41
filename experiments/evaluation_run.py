"""The flags and the model that all evaluations of `experiments.evaluate` share."""

import pathlib
from typing import Any

from absl import flags

from experiments import evaluation_inputs, inference
from lwm.evals.answers import Answerer
from lwm.evals.requests import Requests


class Options:
  """Defines the flags that all evaluations share.

  Attributes:
    model: flags of the model.
    inputs: flags of what evaluations read.
  """

  def __init__(self) -> None:
    self.model = inference.Flags()
    self.inputs = evaluation_inputs.Inputs()
    self._samples = flags.DEFINE_integer(
      "samples",
      1,
      "Number of samples: questions per context and depth, windows of a text, documents per "
      "dataset, or clips.",
      lower_bound=1,
    )
    self._chat = flags.DEFINE_bool("chat", False, "Ask in the tokenizer's chat template.")
    self._rows = flags.DEFINE_integer(
      "rows", None, "Questions at a time. Default: one per replica of the model.", lower_bound=1
    )
    self._output = flags.DEFINE_string(
      "output", None, "Directory of the results. Default: WORKDIR/evals."
    )
    # By default, decoding is greedy, and each evaluation has its own maximum length of answers.
    flags.FLAGS.set_default("temperature", 0.0)
    flags.FLAGS.set_default("num_tokens", None)

  @property
  def samples(self) -> int:
    """--samples."""
    return self._samples.value or 1

  @property
  def chat(self) -> bool:
    """--chat."""
    return bool(self._chat.value)

  @property
  def rows(self) -> int:
    """--rows."""
    return self._rows.value or 1

  @property
  def output(self) -> pathlib.Path:
    """--output."""
    return pathlib.Path(self._output.value or self.model.workdir / "evals")


class Run:
  """What all evaluations of a program share.

  Attributes:
    options: flags of all evaluations.
    flags: `options.model`, the flags of the model.
    inputs: `options.inputs`, what evaluations read.
    checkpoint: the model, before its weights are read.
    output: directory of the results.
    title: names the model.
  """

  def __init__(self, options: Options):
    """Raises UserError if films cannot be read, or a cache does not fit in memory."""
    self.options, self.flags, self.inputs = options, options.model, options.inputs
    self.inputs.check_films()
    self.checkpoint = inference.Checkpoint(self.flags)
    self.checkpoint.check_cache(options.rows, self.inputs.contexts()[-1])
    self.output, self.title = options.output, self.checkpoint.workdir.name

  def settings(self, name: str) -> dict[str, Any]:
    """The settings of every evaluation, for the first line of its answers."""
    return {
      "evaluation": name,
      "model": self.checkpoint.stored.identity,
      "weights": self.flags.weights,
      "cache": self.flags.cache,
    }

  def answer_tokens(self, default: int) -> int:
    """Maximum number of tokens in an answer: --num_tokens, or else `default`."""
    return flags.FLAGS["num_tokens"].value or default

  def answerer(self) -> Answerer:
    """Reads the weights, and returns what answers prompts with them."""
    engine = self.checkpoint.engine(self.checkpoint.load())
    rows = engine.padded(self.options.rows)
    return Answerer(engine, self.checkpoint.tokenizer, self.checkpoint.text(), rows)

  def requests(self) -> Requests:
    """Like `answerer`, for the requests of an evaluation harness."""
    return Requests(self.answerer(), self.inputs.contexts()[-1])
