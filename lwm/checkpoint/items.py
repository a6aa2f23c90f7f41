"""The kinds of items that Orbax writes into a checkpoint for us."""

import dataclasses
import functools
import pathlib

import jax
import orbax.checkpoint as ocp
from etils import epath

from lwm.checkpoint import digests

# Orbax puts this file into the directory of every complete item.
_ORBAX_MARK = "commit_success.txt"


def stored_file(item: pathlib.Path) -> pathlib.Path:
  """The file in the directory of an item that `FileSave` wrote."""
  (path,) = (path for path in item.iterdir() if path.name != _ORBAX_MARK)
  return path


class FileHandler(ocp.CheckpointHandler):
  """Stores one small file under its own name."""

  def save(self, directory: epath.Path, args: "FileSave") -> None:
    if jax.process_index() == 0:
      (directory / args.name).write_bytes(args.content)

  def restore(self, directory: epath.Path, args: ocp.args.CheckpointArgs | None = None) -> bytes:
    del args
    return stored_file(pathlib.Path(directory)).read_bytes()


# Orbax wants arguments for restoring too; lwm/checkpoint/reader.py reads without its manager.
@ocp.args.register_with_handler(FileHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class FileSave(ocp.args.CheckpointArgs):
  """Saves `content` as a file called `name`."""

  name: str
  content: bytes


class ArraysHandler(ocp.StandardCheckpointHandler):
  """Stores a tree of arrays, and digests of what each process writes of it."""

  async def async_save(self, directory: epath.Path, args: "ArraysSave") -> list[ocp.future.Future]:
    written = await super().async_save(directory, args=args)
    digest = functools.partial(digests.write_own, pathlib.Path(directory))
    return [ocp.future.ChainedFuture(written, digest)]


@ocp.args.register_with_handler(ArraysHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ArraysSave(ocp.args.StandardSave):
  """Saves a tree of arrays."""
