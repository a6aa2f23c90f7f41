"""The task of a language model's run."""

import pathlib
from typing import Any

from jax.sharding import Mesh

from lwm.checkpoint.identity import Identity, manifest_digest
from lwm.config.experiment import Experiment, Stage
from lwm.data import Dataset, Loader, load_tokenizer, open_datasets
from lwm.data.dataset import VALIDATION
from lwm.data.tokenizer import tokenizer_files
from lwm.program.stage import StageProgram
from lwm.program.trainable import check_trainable
from lwm.report import held_out
from lwm.report.language import LanguagePresentation
from lwm.report.presentation import Record
from lwm.train.init_from import initial_params


class LanguageTask:
  """See `lwm.train.task.Task`."""

  def __init__(self, experiment: Experiment):
    self._experiment = experiment
    self.presentation = LanguagePresentation(experiment)

  def identity(self) -> Identity:
    """Reads the tokenizer and the manifests of the datasets.

    Raises:
      UserError: the tokenizer or a dataset is missing, or does not fit the experiment.
    """
    experiment = self._experiment
    tokenizer = load_tokenizer(experiment.tokenizer)
    manifests = {}
    for config in experiment.datasets:
      dataset = Dataset(config.path)
      dataset.check_tokenizer(tokenizer)
      manifests[config.name] = manifest_digest(dataset.manifest)
    # A stage that cannot run is an error before the stages ahead of it are trained.
    check_trainable(experiment)
    for stage in experiment.stages:
      open_datasets(experiment, stage)
    return Identity(experiment, tokenizer_files(tokenizer.path), manifests)

  def initial_params(self, program: StageProgram, identity: Identity) -> tuple[Any, str]:
    return initial_params(self._experiment, program, identity.tokenizer)

  def open_loader(self, index: int, mesh: Mesh) -> Loader:
    return Loader(self._experiment, index, mesh)

  def notes(self, program: StageProgram, loader: Loader) -> list[str]:
    """What the datasets hold in rows of this length, and what is trained if that is not all."""
    trained = program.trained_text()
    return loader.report() + ([f"{loader.stage.name} | {trained}"] if trained else [])

  def batch_text(self, stage: Stage) -> str:
    return f"{stage.sequence_length} tokens x {stage.rows_per_batch} rows"

  def less_memory(self, stage: Stage) -> str:
    return (
      "try --config.model.remat=full, or more devices along fsdp or ring of the stage's mesh; "
      f"python -m experiments.plan --config=... --topology=... --stage={stage.name} --search finds "
      "what fits"
    )

  def held_out(self, program: StageProgram, loader: Loader, params: Any) -> list[Record]:
    """Held-out losses of the stage's datasets: see lwm/report/held_out.py."""
    return [
      row
      for name in loader.evaluation_datasets
      for row in held_out.losses(
        params,
        program.evaluation_step,
        loader.evaluation_batches(name),
        name,
        loader.datasets[name].unigram_entropy(VALIDATION),
      )
    ]

  def write_results(
    self, workdir: pathlib.Path, program: StageProgram, loader: Loader, params: Any
  ) -> list[str]:
    return []
