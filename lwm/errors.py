"""The errors that end in a sentence at the terminal instead of a stack trace."""

# EX_TEMPFAIL of sysexits.h: start the same command again.
RESUME_EXIT_CODE = 75


class UserError(Exception):
  """Something that the person who started the program can mend.

  The message is one sentence that names the file, flag or record, and what to do. Programs in
  experiments/ print it and exit with status 1.
  """


class ConfigError(UserError):
  """A setting, or two that do not go together. The message is for the person at the terminal."""


class ResumeError(UserError):
  """A run that ended before its end, and that the same command takes up again.

  The message is one sentence that says why. Programs in experiments/ print it and exit with status
  RESUME_EXIT_CODE, at which a launcher starts them anew.
  """
