"""Prints the perplexity of a text for each form of a model's weights and cache.

    python -m experiments.perplexity --workdir=weights/smollm2 --text=emma.txt --tokens=1024 \\
        --weights=float32,int8,int4 --cache=dense,int8

Each line has the memory of the weights, and the change in perplexity relative to the first line.
The window begins with <bos>, which is not a target.
"""

import pathlib

import jax
import jax.numpy as jnp
from absl import flags

from experiments import flags as experiment_flags
from experiments.runtime import devices
from lwm import infer
from lwm.data import load_tokenizer
from lwm.errors import UserError
from lwm.evals import perplexity
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The --workdir of experiments.train, or the --output of import_weights."
)
_TEXT = flags.DEFINE_string("text", None, "A text file in UTF-8.")
_TOKENS = flags.DEFINE_integer("tokens", 1024, "Tokens of the window.", lower_bound=2)
_START = flags.DEFINE_integer("start", 0, "Where in the text the window begins.", lower_bound=0)
_BOS = flags.DEFINE_bool("bos", True, "Put <bos> before the window, as before a document.")
_WEIGHTS = flags.DEFINE_list(
  "weights", ["float32"], f"Forms of the weights to compare: {', '.join(infer.FORMS)}."
)
_CACHE = flags.DEFINE_list(
  "cache", ["dense"], f"Forms of the cache to compare: {', '.join(infer.CACHE_FORMS)}."
)
flags.mark_flags_as_required(["workdir", "text"])


def window(tokenizer_path: pathlib.Path) -> jax.Array:
  """The tokens of the window, int32. All but the first are targets."""
  path = pathlib.Path(_TEXT.value or "")
  try:
    text = path.read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--text={path} cannot be read as UTF-8 text: {error}.") from error
  tokenizer = load_tokenizer(tokenizer_path)
  tokens = tokenizer.encode(text)[_START.value : _START.value + _TOKENS.value]
  if len(tokens) < _TOKENS.value:
    raise UserError(
      f"--text={path} has {len(tokens)} tokens from --start={_START.value} on, fewer than "
      f"--tokens={_TOKENS.value}: set them so that they fit."
    )
  return jnp.asarray([tokenizer.bos_id, *tokens] if _BOS.value else tokens, jnp.int32)


def main(argv: list[str]) -> None:
  del argv
  workdir = pathlib.Path(_WORKDIR.value or "")
  for form in _WEIGHTS.value or [""]:
    if form not in infer.FORMS:
      raise UserError(f"--weights={form}: the forms are {', '.join(infer.FORMS)}.")
  for cache in _CACHE.value or [""]:
    if cache not in infer.CACHE_FORMS:
      raise UserError(f"--cache={cache}: the forms are {', '.join(infer.CACHE_FORMS)}.")
  first = None
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), devices()[:1])):
    for form in _WEIGHTS.value:
      trained = infer.load_trained(workdir, form)
      tokens_S = window(trained.tokenizer)
      for cache in _CACHE.value:
        value = perplexity(
          trained.model,
          trained.params,
          tokens_S,
          rope_theta=trained.rope_theta,
          int8_cache=cache == "int8",
        )
        first = first or value
        form_of_cache = "" if len(_CACHE.value) == 1 else f", {cache} cache"
        print(
          f"{form}{form_of_cache}: {infer.num_bytes(trained.params) / 2**20:.1f} MiB of weights, "
          f"perplexity {value:.4f} ({value / first - 1:+.2%})",
          flush=True,
        )


if __name__ == "__main__":
  experiment_flags.run(main)
