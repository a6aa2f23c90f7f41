"""Which format a model's files have."""

import pathlib

from lwm.convert.gguf.model import read_gguf
from lwm.convert.hugging_face.read import read_hugging_face
from lwm.convert.lwm_release.release import ReleaseOptions, is_release, read_release
from lwm.convert.weights import Weights
from lwm.errors import UserError

_GGUF_MAGIC = b"GGUF"


def read_weights(name: str, options: ReleaseOptions) -> Weights:
  """A model of another codebase, ready to be imported.

  Args:
    name: a Hugging Face directory, a GGUF file, or KIND::FILE, a release of LWM's.
    options: its tokenizer, and what releases of LWM's do not say.

  Raises:
    UserError: it is none of these, is damaged, or is a model that is not supported.
  """
  if is_release(name):
    return read_release(name, options)
  path = pathlib.Path(name)
  if not path.exists():
    raise UserError(f"--input={name}: there is no such file or directory.")
  settings = {"--preset": options.preset, "--rope_theta": options.rope_theta}
  settings |= {"--context": options.context, "--num_heads": options.num_heads}
  if given := [flag for flag, value in settings.items() if value is not None]:
    raise UserError(f"{given[0]} is only for releases of LWM's: {name} says this itself.")
  if path.is_dir():
    return read_hugging_face(path, options.tokenizer)
  with path.open("rb") as file:
    if file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC:
      return read_gguf(path)
  raise UserError(
    f"--input={name} is neither a Hugging Face directory nor a GGUF file: give one of these, or "
    "KIND::FILE for a release of LWM's (docs/lwm_weights.md)."
  )
