"""Checkpoints: everything that a run needs to resume as if it had never stopped.

A checkpoint is a directory `checkpoints/STEP`, where STEP counts over all stages. Its six items:

    params      parameters
    optimizer   the optimizer's state
    progress    the position (see position.py)
    config      the experiment
    datasets    SHA-256 of each dataset's manifest
    tokenizer   the tokenizer's file and its settings; empty for a VQGAN

Orbax writes it in the background, into a directory that gets its final name only at the end. So a
checkpoint is complete or absent; the next run removes what a killed one left incomplete. Older
checkpoints are deleted only once a newer one is complete: a save that fails, usually because the
disk is full, ends the run with RESUME_EXIT_CODE and leaves the previous checkpoint intact.

A checkpoint whose files are not what was written (see digests.py) is renamed to `STEP.damaged`, and
the one before it is used. If all are damaged, that is an error and they keep their names.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lwm.checkpoint import digests
from lwm.checkpoint.identity import Identity, change_of_the_past, datasets_of_the_past
from lwm.checkpoint.items import ArraysSave, FilesSave
from lwm.checkpoint.position import Position
from lwm.checkpoint.reader import StoredCheckpoint, all_steps
from lwm.config.experiment import Experiment
from lwm.errors import ResumeError, UserError, disk_error
from lwm.program.state import TrainState


class Manager(ocp.CheckpointManager):
  """Orbax's manager, without its questions to JAX's preemption service.

  The service remembers only the last number that it was asked about, so only lwm/train/stop.py may
  ask.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


class Checkpoints:
  """The checkpoints of one working directory."""

  def __init__(self, directory: pathlib.Path, keep: int):
    """Opens or creates `directory`, removing what a killed run left incomplete.

    Args:
      directory: holds checkpoints only.
      keep: number of checkpoints to keep, the newest ones.
    """
    self._directory = directory.absolute()
    # Total steps of the checkpoint that is being written, or None.
    self._saving: int | None = None
    # Whether that checkpoint is known to have failed.
    self._failed = False
    self._manager = Manager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
          barrier_sync_fn=self._meet,
          # Runs in process 0, last before the directory gets its final name.
          post_finalization_callback=lambda: digests.write(self._incomplete()),
        ),
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
    self.close()

  @property
  def newest(self) -> pathlib.Path | None:
    """The newest complete checkpoint, or the one being written."""
    step = self._manager.latest_step()
    return None if step is None else self.path(step)

  def path(self, total_steps: int) -> pathlib.Path:
    """The directory of a checkpoint."""
    return self._directory / str(total_steps)

  def save(self, state: TrainState, position: Position, identity: Identity) -> None:
    """Starts to write a checkpoint; returns once the arrays are copied to host memory.

    Does nothing if there is a checkpoint of this step already.

    Raises:
      ResumeError: this checkpoint or the one before it could not be written.
    """
    self.wait()
    if self._manager.latest_step() == position.total_steps:
      return
    self._saving = position.total_steps
    with self._failure_explained():
      self._manager.save(
        position.total_steps,
        args=ocp.args.Composite(
          params=ArraysSave(state.params),
          optimizer=ArraysSave(state.optimizer_state),
          progress=ocp.args.JsonSave(dataclasses.asdict(position)),
          config=ocp.args.JsonSave(dataclasses.asdict(identity.experiment)),
          datasets=ocp.args.JsonSave(identity.manifests),
          tokenizer=FilesSave(identity.tokenizer_files),
        ),
      )

  def check(self) -> None:
    """Raises a ResumeError if the checkpoint being written has failed. Does not wait."""
    if self._failed or (self._saving is not None and not self._manager.is_saving_in_progress()):
      self.wait()

  def wait(self) -> None:
    """Returns once the checkpoint being written is complete. Raises ResumeError if it fails."""
    if self._saving is not None:
      with self._failure_explained():
        self._manager.wait_until_finished()
      self._saving = None

  def latest(self, identity: Identity) -> tuple[Position | None, list[str]]:
    """The newest undamaged checkpoint, after renaming damaged ones that are newer.

    Returns:
      Its position, or None if there is no checkpoint at all; and one sentence for each checkpoint
      that was renamed or that cannot be verified.

    Raises:
      UserError: it belongs to a run of another identity, or all checkpoints are damaged.
    """
    self.wait()
    damaged = {}
    for total_steps in all_steps(self._directory):
      stored = StoredCheckpoint(self.path(total_steps))
      file = digests.damaged_file(stored.path)
      unchecked = file == digests.FILE_NAME and stored.predates_digests
      if file is None or unchecked:
        break
      damaged[total_steps] = file
    else:
      if damaged:
        names = ", ".join(f"{self.path(step)} ({file})" for step, file in damaged.items())
        raise UserError(
          f"All checkpoints are damaged: {names}: restore one of them from a copy, or start a new "
          "run with another --workdir."
        )
      return None, []
    self._check_identity(stored, identity)
    notes = [self._set_aside(step, file, total_steps) for step, file in damaged.items()]
    if damaged:
      multihost_utils.sync_global_devices("damaged checkpoints are set aside")
      self._manager.reload()
    if unchecked:
      notes.append(
        f"{stored.path} was written by an older version, without {digests.FILE_NAME}, so it cannot "
        "be checked for damage"
      )
    return stored.position, notes

  def restore(self, position: Position, abstract: TrainState) -> TrainState:
    """Reads the whole state, each array straight into its shards."""
    self.wait()
    stored = StoredCheckpoint(self.path(position.total_steps))
    step = jax.device_put(position.step, abstract.step.sharding)
    return TrainState(
      stored.params(abstract.params),
      stored.moments(abstract.optimizer_state),
      step.astype(abstract.step.dtype),
    )

  def restore_params(self, position: Position, abstract_params: Any) -> Any:
    """Reads the parameters alone, which is what the next stage starts from."""
    self.wait()
    return StoredCheckpoint(self.path(position.total_steps)).params(abstract_params)

  def close(self) -> None:
    """Waits for the checkpoint being written, and closes Orbax's manager."""
    self.wait()
    self._manager.close()

  def _check_identity(self, stored: StoredCheckpoint, identity: Identity) -> None:
    current = dataclasses.asdict(identity.experiment)
    difference = change_of_the_past(stored.config, current, stored.position)
    experiment = identity.experiment
    if difference is None and isinstance(experiment, Experiment):
      if stored.tokenizer != identity.tokenizer:
        difference = f"another tokenizer than {experiment.tokenizer}"
    for name in sorted(datasets_of_the_past(current, stored.position) & identity.manifests.keys()):
      if difference is None and stored.manifests[name] != identity.manifests[name]:
        difference = f"dataset {name!r} as it was before it was prepared again"
    if difference:
      raise UserError(
        f"{self._directory.parent} holds a run with {difference}: set it back, or start a new run "
        "with another --workdir."
      )

  def _set_aside(self, total_steps: int, file: str, instead: int) -> str:
    path = self.path(total_steps)
    taken = len(list(self._directory.glob(f"{path.name}.damaged*")))
    aside = path.with_name(f"{path.name}.damaged" + (f"-{taken + 1}" if taken else ""))
    multihost_utils.sync_global_devices("all processes know the new name")
    if jax.process_index() == 0:
      path.rename(aside)
    return (
      f"{path} is damaged ({file}) and was renamed to {aside.name}; resuming from the checkpoint "
      f"after step {instead}"
    )

  def _meet(self, *, key: str, timeout_ms: int) -> None:
    """Waits for the other processes between the parts of a checkpoint, unless this one has failed.

    Orbax would let a process whose part has failed wait too, while the others wait elsewhere: all
    of them for 20 minutes, and the error would be lost.
    """
    if error := sys.exception():
      self._failed = True
      raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

  def _incomplete(self) -> pathlib.Path:
    """The directory of the checkpoint that is being written."""
    (path,) = self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
    return path

  @contextlib.contextmanager
  def _failure_explained(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError) as error:
      reason = disk_error(error)
      if reason is None:
        raise
      failed, self._saving, self._failed = self._saving, None, False
      assert failed is not None
      if jax.process_index() == 0:
        for path in self._directory.glob(f"{failed}.orbax-checkpoint-tmp*"):
          shutil.rmtree(path, ignore_errors=True)
      self._manager.reload()
      left = f"{self.newest} is complete" if self.newest else "there is none before it"
      raise ResumeError(
        f"Checkpoint {self.path(failed)} could not be written ({reason}), {left}: fix the disk and "
        "run the same command again."
      ) from error
