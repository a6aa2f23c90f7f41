"""The working directory of a run: writable, shared by all processes, used by one run at a time."""

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

# Process 0 locks this file until it ends, however it ends; the file itself stays.
LOCK_NAME = "lock"


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
  """Creates `workdir` if needed, and keeps other runs out of it inside the `with`.

  All processes of a run must call this. Without file locks, other runs are not kept out.

  Raises:
    UserError: it cannot be written to, or some processes see another directory of that name.
    ResumeError: another run uses it.
  """
  with _locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
    if jax.process_count() > 1:
      _check_that_all_share(workdir)
    yield


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
  path = workdir / LOCK_NAME
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
  except OSError as error:
    raise UserError(
      f"--workdir={workdir} cannot be written to ({error.strerror}): fix that, or use another "
      "directory."
    ) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ResumeError(
        f"{workdir} is in use by another run ({file.read().strip()}): wait until it ends, or use "
        f"another --workdir; if that run is gone for good, remove {path}."
      ) from None
    except OSError:
      pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    os.fsync(file.fileno())
    yield


def _check_that_all_share(workdir: pathlib.Path) -> None:
  """Raises a UserError in all processes unless every process sees what process 0 writes."""
  # A new name, which no host can have cached.
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
      f"--workdir={workdir}: process {blind[0]} does not see what process 0 writes there; "
      "use a directory on a disk that all hosts share."
    )
