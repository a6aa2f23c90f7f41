"""What a run trains: the only part of the training loop that depends on the kind of experiment."""

import pathlib
from typing import Any, Protocol

from jax.sharding import Mesh

from lwm.checkpoint.identity import Identity
from lwm.config.experiment import AnyExperiment, VQGANExperiment
from lwm.program.stage import StageProgram
from lwm.report.presentation import Presentation, Record
from lwm.train.language import LanguageTask
from lwm.train.vqgan import VQGANTask


class Task(Protocol):
  """The operations of a run that depend on the kind of its experiment."""

  @property
  def presentation(self) -> Presentation:
    """How its run is reported."""

  def identity(self) -> Identity:
    """What tells this run from others. Raises UserError if data are missing or do not fit."""

  def initial_params(self, program: StageProgram, identity: Identity) -> tuple[Any, str]:
    """The parameters of a run without a checkpoint, from `init_from` or random.

    Returns:
      The parameters, and a sentence that says where they come from; empty for random ones.
    """

  def open_loader(self, index: int, mesh: Mesh) -> Any:
    """The batches of a stage: a Loader, or one with the same methods."""

  def notes(self, program: StageProgram, loader: Any) -> list[str]:
    """What a person should know before a stage begins, as lines."""

  def batch_text(self, stage: Any) -> str:
    """The size of a stage's batches."""

  def less_memory(self, stage: Any) -> str:
    """What to try if a stage needs more memory than its devices have."""

  def held_out(self, program: StageProgram, loader: Any, params: Any) -> list[Record]:
    """Results on held-out rows; each has the name of its dataset."""

  def write_results(
    self, workdir: pathlib.Path, program: StageProgram, loader: Any, params: Any
  ) -> list[str]:
    """Writes what a finished stage leaves beside its checkpoint; returns lines that name it."""


def task_of(experiment: AnyExperiment) -> Task:
  """The task of a validated experiment."""
  if isinstance(experiment, VQGANExperiment):
    return VQGANTask(experiment)
  return LanguageTask(experiment)
