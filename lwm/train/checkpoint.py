"""Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is a directory `checkpoints/STEP`, STEP counting over all stages, of six items:
`params`, `optimizer` (moments), `progress` (stage and step: the position in the data too, for
batches are functions of both), `config` (the experiment), `datasets` (SHA-256 of their manifests)
and `tokenizer` (the file itself). Orbax writes it beside the training, into a directory of another
name that it renames at the end; so a checkpoint is complete or is not there, and what a killed run
left half done is removed by the next.

Resume precedence: the newest complete checkpoint of the working directory, if its config agrees
with the command line, else an error; without one, freshly initialised parameters. Settings that
cannot change what a run computes, but for the order of float32 sums, may change: see FREE.
"""

import dataclasses
import pathlib
import re
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from lwm.errors import UserError
from lwm.experiment import Experiment
from lwm.train.state import TrainState

# Settings, as regular expressions over their paths, that may differ from the run being resumed.
FREE = (
    r"name",
    # The tokenizer's bytes are compared instead; data is found wherever it has moved to.
    r"tokenizer",
    r"datasets\[\d+\]\.path",
    r"data\..*",
    r"checkpoint\..*",
    r"evaluation\..*",
    # The same batches and the same mathematics, cut up in another way.
    r"stages\[\d+\]\.(mesh\..*|layout|accumulation_steps)",
    r"model\.(remat|feed_forward_chunk|loss_chunk)",
)


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


@dataclasses.dataclass(frozen=True)
class Progress:
  """Where a run is: `step` steps of stage `stage` are done, `total_steps` over all stages."""

  stage: int
  step: int
  total_steps: int


@dataclasses.dataclass(frozen=True)
class Identity:
  """What a run is: two runs with one identity and one progress go on in the same way.

  `tokenizer` is the content of its file, `manifests` the SHA-256 of each dataset's, by name.
  """

  experiment: Experiment
  tokenizer: bytes
  manifests: dict[str, str]


class Checkpoints:
  """The checkpoints of one working directory."""

  def __init__(self, directory: pathlib.Path, keep: int):
    """Opens or creates `directory`, removing what a killed run left incomplete.

    Args:
      directory: of checkpoints only.
      keep: how many of the newest to keep.
    """
    policy = ocp.checkpoint_managers.LatestN(keep)
    self._manager = ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policy, cleanup_tmp_directories=True
        ),
    )

  def save(self, state: TrainState, progress: Progress, identity: Identity) -> None:
    """Starts to write a checkpoint; returns when the arrays have been copied to host memory."""
    self._manager.save(
        progress.total_steps,
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.optimizer_state),
            progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
            config=ocp.args.JsonSave(dataclasses.asdict(identity.experiment)),
            datasets=ocp.args.JsonSave(identity.manifests),
            tokenizer=FileSave(
                pathlib.Path(identity.experiment.tokenizer).name, identity.tokenizer
            ),
        ),
    )

  def latest(self, identity: Identity) -> Progress | None:
    """The newest complete checkpoint's progress, or None if there is none.

    Raises:
      UserError: it belongs to a run of another identity.
    """
    total_steps = self._manager.latest_step()
    if total_steps is None:
      return None
    stored = self._manager.restore(
        total_steps,
        args=ocp.args.Composite(
            progress=ocp.args.JsonRestore(),
            config=ocp.args.JsonRestore(),
            datasets=ocp.args.JsonRestore(),
            tokenizer=FileRestore(),
        ),
    )
    difference = first_difference(stored.config, dataclasses.asdict(identity.experiment))
    if difference is None and stored.tokenizer[1] != identity.tokenizer:
      difference = f"another tokenizer than {identity.experiment.tokenizer}"
    for name, manifest in identity.manifests.items():
      if difference is None and stored.datasets[name] != manifest:
        difference = f"dataset {name!r} as it was before it was prepared again"
    if difference:
      raise UserError(
          f"{self._manager.directory.parent} holds a run with {difference}: set it back, or start "
          "anew with another --workdir."
      )
    return Progress(**stored.progress)

  def restore(self, progress: Progress, abstract: TrainState) -> TrainState:
    """Reads each array straight into its shards: there is never a second copy of the state."""
    restored = self._manager.restore(
        progress.total_steps,
        args=ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(abstract.optimizer_state),
        ),
    )
    step = jax.device_put(progress.step, abstract.step.sharding)
    return TrainState(restored.params, restored.optimizer, step.astype(abstract.step.dtype))

  def wait(self) -> None:
    """Returns when the checkpoint being written is complete."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def first_difference(stored: Any, current: Any, path: str = "") -> str | None:
  """The first setting in which two experiments (as nested dicts and lists) differ, but for FREE.

  Returns:
    "config.PATH=STORED, not CURRENT", or None.
  """
  if any(re.fullmatch(pattern, path) for pattern in FREE):
    return None
  if isinstance(stored, dict) and isinstance(current, dict):
    pairs = [(f"{path}.{key}".lstrip("."), stored.get(key), current.get(key))
             for key in current | stored]
  elif isinstance(stored, list) and isinstance(current, list) and len(stored) == len(current):
    pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(stored, current))]
  elif isinstance(stored, list) and isinstance(current, list):
    return f"{len(stored)} config.{path}, not {len(current)}"
  else:
    return None if stored == current else f"config.{path}={stored!r}, not {current!r}"
  differences = (first_difference(ours, theirs, where) for where, ours, theirs in pairs)
  return next((difference for difference in differences if difference), None)
