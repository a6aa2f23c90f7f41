"""A checkpoint of parameters alone: what weights that no run here has trained become.

It has the items of a run's checkpoint except the optimizer's state (see checkpoints.py). Everything
that reads a run's checkpoint reads it too: `Experiment.init_from`, generation, export.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from lwm.checkpoint import digests
from lwm.checkpoint.arrays import ArrayInfo, ArrayWriter
from lwm.checkpoint.position import START
from lwm.config.experiment import Experiment
from lwm.errors import UserError, disk_error


@contextlib.contextmanager
def write_parameters(
  directory: pathlib.Path,
  experiment: Experiment,
  tokenizer_files: Mapping[str, bytes],
  arrays: Mapping[str, ArrayInfo],
) -> Iterator[ArrayWriter]:
  """Writes a checkpoint, which exists complete or not at all.

  Until it is complete it is called DIRECTORY.unfinished. What is left of an earlier attempt is
  removed first. The caller may add files of its own beside `writer.item`.

  Args:
    directory: the checkpoint; must not exist, except empty.
    experiment: its model, and one stage with its RoPE theta and context.
    tokenizer_files: as `lwm.data.tokenizer.tokenizer_files` returns them.
    arrays: shape and dtype of each parameter, by dotted path.

  Yields:
    What the parameters are written with.

  Raises:
    UserError: the directory exists, or the disk is full.
  """
  with unfinished(directory) as new:
    settings: dict[str, Any] = {
      "progress": dataclasses.asdict(START),
      "config": dataclasses.asdict(experiment),
      "datasets": {},
    }
    for item, values in settings.items():
      (new / item).mkdir()
      (new / item / "metadata").write_text(json.dumps(values))
    (new / "tokenizer").mkdir()
    for name, content in tokenizer_files.items():
      (new / "tokenizer" / name).write_bytes(content)
    with ArrayWriter(new / "params", arrays) as writer:
      yield writer
    digests.write(new)


@contextlib.contextmanager
def unfinished(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new directory DIRECTORY.unfinished, which gets its final name at the end.

  After an error nothing is left of it. A killed program leaves it, and the next one removes it.

  Raises:
    UserError: the directory exists and is not empty, or cannot be written.
  """
  # The program can replace an empty directory, but not the one that it runs in, nor a link.
  is_replaceable = directory.name and os.path.isdir(directory) and not os.path.islink(directory)
  if os.path.lexists(directory) and not (is_replaceable and not any(directory.iterdir())):
    raise UserError(f"{directory} exists: name another --output, or remove it.")
  new = directory.with_name(directory.name + ".unfinished")
  try:
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    _sync(new)
    if directory.exists():
      directory.rmdir()
    new.rename(directory)
  except BaseException as error:
    shutil.rmtree(new, ignore_errors=True)
    if reason := disk_error(error):
      raise UserError(
        f"{directory} could not be written ({reason}): fix the disk and run the same command again."
      ) from error
    raise


def _sync(directory: pathlib.Path) -> None:
  """Returns once all files in a directory are on the disk."""
  for path in directory.rglob("*"):
    if path.is_file():
      descriptor = os.open(path, os.O_RDONLY)
      try:
        os.fsync(descriptor)
      finally:
        os.close(descriptor)
