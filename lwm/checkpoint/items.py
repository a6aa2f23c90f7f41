"""The kinds of items that Orbax writes into a checkpoint for us."""

import dataclasses
import functools
import pathlib

import jax
import orbax.checkpoint as ocp
from etils import epath

from lwm.checkpoint import digests
from lwm.data.tokenizer import SETTINGS_FILES

# Orbax puts this file into the directory of every complete item.
_ORBAX_MARK = "commit_success.txt"


def stored_tokenizer(item: pathlib.Path) -> pathlib.Path:
  """The tokenizer's file in an item that `FilesSave` wrote; its settings may be beside it."""
  (path,) = (path for path in item.iterdir() if path.name not in (_ORBAX_MARK, *SETTINGS_FILES))
  return path


class FilesHandler(ocp.CheckpointHandler):
  """Stores a few small files under their own names."""

  def save(self, directory: epath.Path, args: "FilesSave") -> None:
    if jax.process_index() == 0:
      for name, content in args.files.items():
        (directory / name).write_bytes(content)

  def restore(self, directory: epath.Path, args: ocp.args.CheckpointArgs | None = None) -> None:
    raise NotImplementedError("lwm/checkpoint/reader.py reads the files themselves")


# Orbax wants arguments for restoring too; lwm/checkpoint/reader.py reads without its manager.
@ocp.args.register_with_handler(FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
  """Saves files, by name."""

  files: dict[str, bytes]


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
