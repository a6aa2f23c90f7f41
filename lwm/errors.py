"""The one error that ends in a sentence at the terminal instead of a stack trace."""


class UserError(Exception):
  """Something that the person who started the program can mend.

  The message is one sentence that names the file, flag or record, and what to do. Programs in
  experiments/ print it and exit with status 1.
  """
