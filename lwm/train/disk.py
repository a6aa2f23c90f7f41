"""A full or failing disk ends a run in one sentence, and the same command resumes it."""

import contextlib
import errno
import pathlib
from collections.abc import Iterator

from lwm.errors import ResumeError

# No space, or a disk that fails, is gone or has become read-only, as a shared one may at any time.
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
  """Turns what the system says of a full disk or quota, or a failing disk, into a ResumeError."""
  try:
    yield
  except OSError as error:
    if error.errno not in _DISK_ERRORS:
      raise
    raise ResumeError(
      f"Writing to {workdir} failed ({error.strerror}): see to the disk, and start the same "
      "command again; it goes on from the last checkpoint."
    ) from error
