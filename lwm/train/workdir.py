"""The working directory of a run: writable, the same to all processes, and one run's at a time."""

import contextlib
import fcntl
import os
import pathlib
import secrets
import socket
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from lwm.errors import ResumeError, UserError

# Held by process 0 as long as it lives, however it ends; the file itself stays.
LOCK_NAME = "lock"


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
  """Makes `workdir` if need be, and keeps other runs out of it for what runs inside.

  All processes of a run must call this. A file system without locks keeps no one out.

  Raises:
    UserError: it cannot be written to, or some processes have another one of that name.
    ResumeError: another run is in it.
  """
  with _locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
    if jax.process_count() > 1:
      _see_that_all_share(workdir)
    yield


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
  path = workdir / LOCK_NAME
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
  except OSError as error:
    raise UserError(
      f"--workdir={workdir} cannot be written to ({error.strerror}): see to that, or take another."
    ) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ResumeError(
        f"{workdir} is in use by another run ({file.read().strip()}): wait for its end, or take "
        f"another --workdir; if it is gone for good, remove {path}."
      ) from None
    except OSError:
      pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    os.fsync(file.fileno())
    yield


def _see_that_all_share(workdir: pathlib.Path) -> None:
  """Raises a UserError, the same in all processes, unless they see what process 0 writes."""
  # A name that no host has in its caches.
  name = f"{LOCK_NAME}.{multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31)))}"
  if jax.process_index() == 0:
    for path in workdir.glob(f"{LOCK_NAME}.*"):
      path.unlink()
    (workdir / name).touch()
  multihost_utils.sync_global_devices("process 0 has written")
  blind = np.flatnonzero(~multihost_utils.process_allgather(np.bool_((workdir / name).exists())))
  if jax.process_index() == 0:
    (workdir / name).unlink()
  if blind.size:
    raise UserError(
      f"--workdir={workdir}: process {blind[0]} does not see there what process 0 writes; it "
      "must be on a disk that all hosts share."
    )
