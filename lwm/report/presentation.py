"""The part of reporting that depends on the kind of experiment; no other file here does.

lwm/report/language.py and lwm/report/vqgan.py have the implementations.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

from lwm.config.experiment import AnyExperiment

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Unit:
  """What a batch consists of: the metric that counts it, and how a progress line writes its rate.

  A train record has `NAME_per_second`.
  """

  name: str
  per_second: str


class Curve(NamedTuple):
  """A line of a plot; `style` are arguments of matplotlib's `plot`."""

  label: str
  points: list[tuple[int, float]]
  style: dict[str, Any]


class Panel(NamedTuple):
  """A part of a plot; `height` is relative to that of the learning rate."""

  label: str
  curves: list[Curve]
  height: int = 1


class Presentation(Protocol):
  """How a kind of experiment is reported."""

  @property
  def experiment(self) -> AnyExperiment:
    """The experiment of the run."""

  @property
  def unit(self) -> Unit:
    """What its batches consist of."""

  @property
  def compute_dtype(self) -> str:
    """The dtype of matrix products, for the peak FLOP/s of a CPU."""

  @property
  def held_out_title(self) -> str:
    """What the last table of held-out results shows."""

  def units_per_batch(self, stage: Any) -> int:
    """Units in a batch of a stage, padding included, to estimate the remaining time."""

  def flops(self, stage: Any, metrics: Record) -> float:
    """Model FLOPs of a step with these metrics."""

  def recorded(self, metrics: Record) -> Record:
    """The metrics of a step that mean something."""

  def columns(self, record: Record) -> list[str]:
    """The metrics of a train record that a progress line shows after the loss."""

  def summary(self, held_out: list[Record]) -> str:
    """Held-out results as one line."""

  def table(self, held_out: list[Record]) -> str:
    """Held-out results as a table."""

  def panels(self, train: list[Record], evaluations: list[Record]) -> list[Panel]:
    """The curves of a stage, from its train and evaluation records."""
