"""Digests of a checkpoint's files: neither zarr nor OCDBT notices a flipped byte in array data.

`digests.json` is the last file written before a checkpoint is complete. It holds the size and
CRC-32 of every other file. Each process digests what it wrote itself, and later checks its share of
all files.
"""

import json
import os
import pathlib
import zlib
from collections.abc import Iterable
from concurrent import futures

import jax
import numpy as np
from jax.experimental import multihost_utils

FILE_NAME = "digests.json"

# Files that one process wrote of an item, and the file that holds their digests until `write`.
_OWN_FILES = "ocdbt.process_{}"
_OWN_DIGESTS = "digests.process_{}"

# Orbax writes these last, and a run can resume without them.
_ORBAX_FILES = ("commit_success.txt", "_CHECKPOINT_METADATA")

_THREADS = 8
_BLOCK_BYTES = 1 << 22


def write_own(item: pathlib.Path) -> None:
  """Digests the files of an item's arrays that this process wrote."""
  own = item / _OWN_FILES.format(jax.process_index())
  text = json.dumps(_digests(item, (path for path in own.rglob("*") if path.is_file())))
  (item / _OWN_DIGESTS.format(jax.process_index())).write_text(text)


def write(checkpoint: pathlib.Path) -> None:
  """Writes `digests.json` from every process's digests and all other files. Process 0 only."""
  digests: dict[str, tuple[int, int]] = {}
  for path in checkpoint.glob(f"*/{_OWN_DIGESTS.format('*')}"):
    item = path.parent.name
    digests |= {f"{item}/{name}": digest for name, digest in json.loads(path.read_text()).items()}
    path.unlink()
  others = (
    path
    for path in checkpoint.rglob("*")
    if path.is_file() and str(path.relative_to(checkpoint)) not in digests
  )
  digests |= _digests(checkpoint, others)
  with (checkpoint / FILE_NAME).open("w") as file:
    json.dump(digests, file, indent=0)
    file.flush()
    os.fsync(file.fileno())


def damaged_file(checkpoint: pathlib.Path) -> str | None:
  """The path in `checkpoint` of a file that is not what was written, or None.

  All processes of a run must call this, and all get the same answer.
  """
  try:
    expected = {
      name: (size, crc)
      for name, (size, crc) in json.loads((checkpoint / FILE_NAME).read_text()).items()
    }
  except (OSError, ValueError, TypeError, AttributeError):
    # All processes read this file, so all of them return here.
    return FILE_NAME
  # There are few large files: sorted by size, each process gets its share of them.
  names = sorted(expected, key=lambda name: (-expected[name][0], name))
  mine = names[jax.process_index() :: jax.process_count()]
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    matches = pool.map(lambda name: _is(checkpoint / name, expected[name]), mine)
    wrong = [names.index(name) for name, match in zip(mine, matches) if not match]
  first = np.min(multihost_utils.process_allgather(np.int32(min(wrong, default=len(names)))))
  return names[first] if first < len(names) else None


def _digests(root: pathlib.Path, paths: Iterable[pathlib.Path]) -> dict[str, tuple[int, int]]:
  paths = [path for path in sorted(paths) if path.name not in _ORBAX_FILES]
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    return {
      str(path.relative_to(root)): digest for path, digest in zip(paths, pool.map(_digest, paths))
    }


def _digest(path: pathlib.Path) -> tuple[int, int]:
  """Size and CRC-32 of a file."""
  size = crc = 0
  with path.open("rb") as file:
    while block := file.read(_BLOCK_BYTES):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return size, crc


def _is(path: pathlib.Path, digest: tuple[int, int]) -> bool:
  try:
    return _digest(path) == digest
  except OSError:
    return False
