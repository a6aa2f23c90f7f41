"""Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is a directory `checkpoints/STEP`, STEP counting over all stages, of six items:
`params`, `optimizer` (moments), `progress` (stage and step: the position in the data too, for
batches are functions of both), `config` (the experiment), `datasets` (SHA-256 of their manifests)
and `tokenizer` (the file itself). Orbax writes it beside the training, into a directory of another
name that it renames at the end; so a checkpoint is complete or is not there, and what a killed run
left half done is removed by the next. Older ones go only when a newer one is complete: a save that
fails, for want of space as a rule, ends the run with RESUME_EXIT_CODE and the last one intact.

Resume precedence: the newest checkpoint of the working directory, if its config agrees with the
command line, else an error; without one, freshly initialised parameters. One whose files are not
what was written (see digests.py) is set aside, as `STEP.damaged`, and the one before it taken; if
all are damaged that is an error, and they stay. Settings that cannot change what a run computes,
but for the order of float32 sums, may change: see identity.py.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lwm.checkpoint import digests
from lwm.checkpoint.identity import Identity, first_difference, with_defaults
from lwm.checkpoint.position import Position
from lwm.config.experiment import Experiment
from lwm.errors import ResumeError, UserError
from lwm.program.state import TrainState

# Orbax puts this file into the directory of every complete item.
ORBAX_MARK = "commit_success.txt"


class FileHandler(ocp.CheckpointHandler):
  """Stores one small file under its own name."""

  def save(self, directory: epath.Path, args: "FileSave") -> None:
    if jax.process_index() == 0:
      (directory / args.name).write_bytes(args.content)

  def restore(self, directory: epath.Path, args: "FileRestore") -> tuple[str, bytes]:
    del args
    (path,) = (path for path in directory.iterdir() if path.name != ORBAX_MARK)
    return path.name, path.read_bytes()


@ocp.args.register_with_handler(FileHandler, for_save=True)
@dataclasses.dataclass
class FileSave(ocp.args.CheckpointArgs):
  name: str
  content: bytes


@ocp.args.register_with_handler(FileHandler, for_restore=True)
@dataclasses.dataclass
class FileRestore(ocp.args.CheckpointArgs):
  pass


class ArraysHandler(ocp.StandardCheckpointHandler):
  """Stores a tree of arrays, and the digests of what each process writes of it."""

  async def async_save(self, directory: epath.Path, args: "ArraysSave") -> list[ocp.future.Future]:
    written = await super().async_save(directory, args=args)
    digest = functools.partial(digests.write_own, pathlib.Path(directory))
    return [ocp.future.ChainedFuture(written, digest)]


@ocp.args.register_with_handler(ArraysHandler, for_save=True)
@dataclasses.dataclass
class ArraysSave(ocp.args.StandardSave):
  pass


@ocp.args.register_with_handler(ArraysHandler, for_restore=True)
@dataclasses.dataclass
class ArraysRestore(ocp.args.StandardRestore):
  pass


class Manager(ocp.CheckpointManager):
  """Orbax's, but for what it asks JAX's preemption service: of that, only stop.py may ask.

  The service heeds the last number that it was asked for, whoever asks.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


class Checkpoints:
  """The checkpoints of one working directory."""

  def __init__(self, directory: pathlib.Path, keep: int):
    """Opens or creates `directory`, removing what a killed run left incomplete.

    Args:
      directory: of checkpoints only.
      keep: how many of the newest to keep.
    """
    self._directory = directory.absolute()
    # Total steps of the checkpoint that is being written, or None.
    self._saving = None
    # Whether that is known not to become one.
    self._failed = False
    self._manager = Manager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
          barrier_sync_fn=self._meet,
          # The last thing before the directory takes its final name; process 0 only.
          post_finalization_callback=lambda: digests.write(self._incomplete()),
        ),
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, error_type, error, traceback) -> None:
    self.close()

  @property
  def newest(self) -> pathlib.Path | None:
    """The newest complete checkpoint, or the one being written."""
    step = self._manager.latest_step()
    return None if step is None else self.path(step)

  def path(self, total_steps: int) -> pathlib.Path:
    """Where the checkpoint is."""
    return self._directory / str(total_steps)

  def save(self, state: TrainState, progress: Position, identity: Identity) -> None:
    """Starts to write a checkpoint; returns when the arrays have been copied to host memory.

    Does nothing if there is one of the same step.

    Raises:
      ResumeError: it cannot be written, or the one before could not be.
    """
    self.wait()
    if self._manager.latest_step() == progress.total_steps:
      return
    self._saving = progress.total_steps
    with self._failure_explained():
      self._manager.save(
        progress.total_steps,
        args=ocp.args.Composite(
          params=ArraysSave(state.params),
          optimizer=ArraysSave(state.optimizer_state),
          progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
          config=ocp.args.JsonSave(dataclasses.asdict(identity.experiment)),
          datasets=ocp.args.JsonSave(identity.manifests),
          tokenizer=FileSave(pathlib.Path(identity.experiment.tokenizer).name, identity.tokenizer),
        ),
      )

  def check(self) -> None:
    """Raises a ResumeError if the checkpoint being written has failed; waits for nothing."""
    if self._failed or (self._saving is not None and not self._manager.is_saving_in_progress()):
      self.wait()

  def wait(self) -> None:
    """Returns when the checkpoint being written is complete. Raises ResumeError if it fails."""
    if self._saving is not None:
      with self._failure_explained():
        self._manager.wait_until_finished()
      self._saving = None

  def latest(self, identity: Identity) -> tuple[Position | None, list[str]]:
    """The newest checkpoint that is as it was written.

    Returns:
      Its progress, or None if there is no checkpoint at all; and a sentence for each newer one,
      which is damaged and was set aside, if it could be checked at all.

    Raises:
      UserError: it belongs to a run of another identity, or all are damaged.
    """
    self.wait()
    damaged = {}
    for total_steps in sorted(self._manager.all_steps(), reverse=True):
      file = digests.damaged_file(self.path(total_steps))
      unchecked = file == digests.FILE_NAME and _is_older(self.path(total_steps))
      if file is None or unchecked:
        break
      damaged[total_steps] = file
    else:
      if damaged:
        names = ", ".join(f"{self.path(step)} ({file})" for step, file in damaged.items())
        raise UserError(
          f"All checkpoints are damaged: {names}: put one of them back from a copy, or start "
          "anew with another --workdir."
        )
      return None, []
    progress = self._progress(total_steps, identity)
    notes = [self._set_aside(step, file, total_steps) for step, file in damaged.items()]
    if damaged:
      multihost_utils.sync_global_devices("damaged checkpoints are set aside")
      self._manager.reload()
    if unchecked:
      notes.append(
        f"{self.path(total_steps)} is by an older version, without {digests.FILE_NAME}: "
        "nothing tells whether it is damaged"
      )
    return progress, notes

  def restore(self, progress: Position, abstract: TrainState) -> TrainState:
    """Reads each array straight into its shards: there is never a second copy of the state."""
    restored = self._manager.restore(
      progress.total_steps,
      args=ocp.args.Composite(
        params=ArraysRestore(abstract.params), optimizer=ArraysRestore(abstract.optimizer_state)
      ),
    )
    step = jax.device_put(progress.step, abstract.step.sharding)
    return TrainState(restored.params, restored.optimizer, step.astype(abstract.step.dtype))

  def restore_params(self, progress: Position, abstract_params: Any) -> Any:
    """Reads the parameters alone: what the next stage starts from."""
    args = ocp.args.Composite(params=ArraysRestore(abstract_params))
    return self._manager.restore(progress.total_steps, args=args).params

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def _progress(self, total_steps: int, identity: Identity) -> Position:
    stored = self._manager.restore(
      total_steps,
      args=ocp.args.Composite(
        progress=ocp.args.JsonRestore(),
        config=ocp.args.JsonRestore(),
        datasets=ocp.args.JsonRestore(),
        tokenizer=FileRestore(),
      ),
    )
    unknown = stored.progress.keys() - {field.name for field in dataclasses.fields(Position)}
    if unknown:
      raise UserError(
        f"{self.path(total_steps)} is by a newer version of this program, which keeps "
        f"{', '.join(sorted(unknown))}: go on with that one."
      )
    config = with_defaults(stored.config, Experiment)
    difference = first_difference(config, dataclasses.asdict(identity.experiment))
    if difference is None and stored.tokenizer[1] != identity.tokenizer:
      difference = f"another tokenizer than {identity.experiment.tokenizer}"
    for name, manifest in identity.manifests.items():
      if difference is None and stored.datasets[name] != manifest:
        difference = f"dataset {name!r} as it was before it was prepared again"
    if difference:
      raise UserError(
        f"{self._directory.parent} holds a run with {difference}: set it back, or start "
        "anew with another --workdir."
      )
    progress = Position(**stored.progress)
    return dataclasses.replace(
      progress,
      passed_over=tuple((first, stop) for first, stop in progress.passed_over),
      losses=tuple((batch, loss) for batch, loss in progress.losses),
    )

  def _set_aside(self, total_steps: int, file: str, instead: int) -> str:
    path = self.path(total_steps)
    taken = len(list(self._directory.glob(f"{path.name}.damaged*")))
    aside = path.with_name(f"{path.name}.damaged" + (f"-{taken + 1}" if taken else ""))
    multihost_utils.sync_global_devices("all processes know the new name")
    if jax.process_index() == 0:
      path.rename(aside)
    return (
      f"{path} is damaged ({file}) and now {aside.name}; going back to the one after step {instead}"
    )

  def _meet(self, *, key: str, timeout_ms: int) -> None:
    """Waits for the others, between the parts of a checkpoint, but not with an error to tell.

    Orbax has a process whose part has failed meet the others too, who are waiting elsewhere: all
    would for 20 minutes, and the error would be lost.
    """
    if error := sys.exception():
      self._failed = True
      raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

  def _incomplete(self) -> pathlib.Path:
    """What is to become the checkpoint that is being written."""
    (path,) = self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
    return path

  @contextlib.contextmanager
  def _failure_explained(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError) as error:
      # TensorStore raises a ValueError of many lines.
      code = re.search(r"\[os_error_code='(\d+)'\]", str(error))
      if not code and not isinstance(error, OSError):
        raise
      reason = os.strerror(int(code[1])) if code else error.strerror or error
      failed, self._saving, self._failed = self._saving, None, False
      if jax.process_index() == 0:
        for path in self._directory.glob(f"{failed}.orbax-checkpoint-tmp*"):
          shutil.rmtree(path, ignore_errors=True)
      self._manager.reload()
      left = f"{self.newest} is complete" if self.newest else "there is none before it"
      raise ResumeError(
        f"Checkpoint {self.path(failed)} could not be written ({reason}), {left}: see to the "
        "disk, and start the same command again."
      ) from error


def _is_older(checkpoint: pathlib.Path) -> bool:
  """Whether a checkpoint was made before there were digests."""
  if (checkpoint / digests.FILE_NAME).exists():
    return False
  try:
    return "passed_over" not in json.loads((checkpoint / "progress" / "metadata").read_text())
  except (OSError, ValueError, TypeError):
    return False
