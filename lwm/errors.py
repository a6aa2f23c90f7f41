"""Errors that end in a sentence at the terminal instead of a stack trace."""

import os
import re

# EX_TEMPFAIL in sysexits.h: start the same command again.
RESUME_EXIT_CODE = 75


class UserError(Exception):
  """Something that the person who started the program can fix.

  The message is one sentence that names the file, flag or record and says what to do. Programs in
  experiments/ print it and exit with status 1.
  """


class ConfigError(UserError):
  """A wrong setting, or two settings that contradict each other."""


class ResumeError(UserError):
  """A run that stopped before its end; the same command resumes it.

  The message is one sentence that says why. Programs in experiments/ print it and exit with status
  RESUME_EXIT_CODE, after which a launcher starts them again.
  """


def disk_error(error: BaseException) -> str | None:
  """Why a disk failed, in words, or None if the error has another cause."""
  # TensorStore raises a ValueError of many lines.
  if isinstance(error, ValueError):
    code = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    return os.strerror(int(code[1])) if code else None
  if isinstance(error, OSError):
    return error.strerror or str(error)
  return None
