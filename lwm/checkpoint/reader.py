"""The only reader of checkpoints: for resuming, for `init_from` and for inference.

A checkpoint is a directory of items; see lwm/checkpoint/checkpoints.py for what they are. Reading
changes nothing and is safe while the run that writes the checkpoints is still training.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lwm.checkpoint import digests
from lwm.checkpoint.arrays import ArrayReader
from lwm.checkpoint.identity import as_dataclass, with_defaults
from lwm.checkpoint.items import stored_tokenizer
from lwm.checkpoint.position import Position
from lwm.config.experiment import AnyExperiment, Experiment, Stage, VQGANExperiment
from lwm.errors import UserError
from lwm.program.trainable import Trainable, matching

# The directory of checkpoints in a run's workdir.
DIRECTORY = "checkpoints"
# The item of a checkpoint that holds the parameters.
PARAMS = "params"


def all_steps(directory: pathlib.Path) -> list[int]:
  """Total steps of the complete checkpoints in a directory, the newest first."""
  if not directory.is_dir():
    return []
  # A checkpoint gets its final name, a number, only when it is complete.
  names = (path.name for path in directory.iterdir())
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def newest(run: pathlib.Path) -> "StoredCheckpoint":
  """The newest checkpoint of a run, verified.

  Args:
    run: the run's workdir, its directory of checkpoints, or one of its checkpoints.

  Raises:
    UserError: there is no checkpoint, or the newest one is damaged.
  """
  path = run
  if not any((run / item).exists() for item in (PARAMS, "progress", digests.FILE_NAME)):
    directory = run / DIRECTORY if (run / DIRECTORY).is_dir() else run
    steps = all_steps(directory)
    if not steps:
      raise UserError(
        f"There is no checkpoint in {run}: name the --workdir of a run of `python -m "
        "experiments.train` that has saved one, or weights that `python -m "
        "experiments.import_weights` has made."
      )
    path = directory / str(steps[0])
  # Checkpoints of older versions have no digests.
  if (path / digests.FILE_NAME).exists() and (file := digests.damaged_file(path)):
    raise _damaged(path, file)
  return StoredCheckpoint(path)


class StoredCheckpoint:
  """A complete checkpoint on disk; items are read when asked for.

  Attributes:
    path: its directory.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path.absolute()

  @functools.cached_property
  def position(self) -> Position:
    """Where the run was. Raises UserError if a newer version of this program wrote it."""
    stored = self._json("progress")
    unknown = stored.keys() - {field.name for field in dataclasses.fields(Position)}
    if unknown:
      raise UserError(
        f"{self.path} was written by a newer version of this program, which also stores "
        f"{', '.join(sorted(unknown))}: resume it with that version."
      )
    position = Position(**stored)
    return dataclasses.replace(
      position,
      passed_over=tuple((first, stop) for first, stop in position.passed_over),
      losses=tuple((batch, loss) for batch, loss in position.losses),
    )

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The experiment, as nested dicts and lists; settings newer than it have their defaults."""
    return with_defaults(self._json("config"), self._kind)

  @functools.cached_property
  def manifests(self) -> dict[str, str]:
    """SHA-256 of each dataset's manifest, by the dataset's name."""
    return self._json("datasets")

  @functools.cached_property
  def experiment(self) -> Experiment:
    """The experiment that it was made with.

    Raises:
      UserError: it holds a VQGAN, or a newer version of this program wrote it.
    """
    return self._experiment(Experiment)

  @functools.cached_property
  def vqgan_experiment(self) -> VQGANExperiment:
    """The experiment of a VQGAN that it was made with.

    Raises:
      UserError: it holds a language model, or a newer version of this program wrote it.
    """
    return self._experiment(VQGANExperiment)

  def require(self, kind: type[AnyExperiment]) -> None:
    """Raises UserError unless it was made with this kind of experiment."""
    if self._kind is not kind:
      names = {Experiment: "a language model", VQGANExperiment: "a VQGAN"}
      raise UserError(f"{self.path} holds {names[self._kind]}: name a run of {names[kind]}.")

  @property
  def _kind(self) -> type[AnyExperiment]:
    return VQGANExperiment if "vqgan" in self._json("config") else Experiment

  def _experiment[Kind: (Experiment, VQGANExperiment)](self, kind: type[Kind]) -> Kind:
    self.require(kind)
    try:
      return as_dataclass(self.config, kind)
    except KeyError as error:
      raise UserError(
        f"{self.path} was written by a newer version of this program, which has the setting "
        f"{error}: read it with that version."
      ) from error

  @property
  def stage(self) -> Stage:
    """The stage of the experiment that the parameters come from."""
    return self.experiment.stages[self.position.stage]

  @property
  def tokenizer_path(self) -> pathlib.Path:
    """The tokenizer's file in the checkpoint; its settings are beside it."""
    try:
      return stored_tokenizer(self.path / "tokenizer")
    except (OSError, ValueError) as error:
      raise _damaged(self.path, "tokenizer") from error

  @property
  def tokenizer(self) -> bytes:
    """Content of the tokenizer's file."""
    return self.tokenizer_path.read_bytes()

  @property
  def identity(self) -> str:
    """A hash that names the checkpoint by its files, hexadecimal."""
    file = self.path / digests.FILE_NAME
    # Checkpoints of older versions have no digests: their place names them.
    content = file.read_bytes() if file.exists() else bytes(self.path)
    return hashlib.sha256(content).hexdigest()

  def reader(self) -> ArrayReader:
    """Reads the parameters one at a time, without devices."""
    return ArrayReader(self.path / PARAMS)

  @property
  def predates_digests(self) -> bool:
    """Whether it was written before checkpoints had digests."""
    if (self.path / digests.FILE_NAME).exists():
      return False
    try:
      return "passed_over" not in self._json("progress")
    except (UserError, TypeError):
      return False

  def params(self, abstract: Any) -> Any:
    """Reads the parameters, each array straight into its shards.

    Tables of ids may have another size than the stored ones: zeros are added for ids at the end,
    or ids at the end are left out. Padding depends on the mesh, and a model may get vision ids.
    Loads of experts (`ExpertsConfig.placement`) are zero or left out likewise.

    Args:
      abstract: a tree of `jax.ShapeDtypeStruct` with shardings, with the structure that was stored.
    """
    loads = matching(abstract, ["*.expert_load"]).names
    if not loads:
      return self._restore(PARAMS, abstract)
    absent = Trainable(loads.difference(self.reader().arrays))
    new, stored = absent.split(abstract)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), new)
    return absent.join(zeros, self._restore(PARAMS, stored))

  def moments(self, abstract: Any) -> Any:
    """Reads the optimizer's state, likewise."""
    return self._restore("optimizer", abstract)

  def _json(self, item: str) -> Any:
    try:
      return json.loads((self.path / item / "metadata").read_text())
    except (OSError, ValueError) as error:
      raise _damaged(self.path, item) from error

  def _restore(self, item: str, abstract: Any) -> Any:
    # Not strict: Orbax pads with zeros, or cuts. Models that differ elsewhere were refused before.
    arguments = jax.tree.map(
      lambda leaf: ocp.ArrayRestoreArgs(
        sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False
      ),
      abstract,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      return checkpointer.restore(
        self.path / item, args=ocp.args.PyTreeRestore(abstract, arguments, partial_restore=True)
      )


def _damaged(checkpoint: pathlib.Path, item: str) -> UserError:
  return UserError(
    f"{checkpoint} is damaged ({item}): restore it from a copy or name an older checkpoint; "
    "`python -m experiments.train` in its run's --workdir resumes from the one before it."
  )
