"""A full or failing disk ends a run in one sentence, and the same command resumes it."""

import contextlib
import errno
import pathlib
from collections.abc import Iterator

from lwm.errors import ResumeError

# The disk is full, failing, gone or read-only; a shared disk can become so at any time.
_DISK_ERRORS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EIO,
  errno.ESTALE,
  errno.EROFS,
  errno.ENOTCONN,
)


@contextlib.contextmanager
def bad_disk_explained(workdir: pathlib.Path) -> Iterator[None]:
  """Turns an operating system's error about a full or failing disk into a ResumeError."""
  try:
    yield
  except OSError as error:
    if error.errno not in _DISK_ERRORS:
      raise
    raise ResumeError(
      f"Writing to {workdir} failed ({error.strerror}): fix the disk and run the same command "
      "again to resume from the last checkpoint."
    ) from error
