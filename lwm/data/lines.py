"""Files with one prompt or question per line."""

import pathlib

from lwm.errors import UserError


def read_lines(path: pathlib.Path, flag: str) -> list[tuple[int, str]]:
  """The lines of a file that are not blank, with their numbers, the first of which is 1.

  Args:
    path: of the file, in UTF-8.
    flag: the name of the flag that gave it, such as "prompts".

  Raises:
    UserError: the file cannot be read, or has no such line.
  """
  try:
    lines = path.read_text("utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--{flag}={path} cannot be read as UTF-8 text: {error}.") from error
  numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
  if not numbered:
    raise UserError(f"--{flag}={path} has no {flag}: write one per line.")
  return numbered
