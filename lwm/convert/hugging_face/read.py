"""Reads a directory of Hugging Face: settings, tokenizer and safetensors."""

import pathlib

from lwm.config.model import ModelConfig
from lwm.convert.hugging_face.config import CONFIG, read_config
from lwm.convert.hugging_face.names import EMBEDDING, HEAD, INVERSE_FREQUENCIES, table
from lwm.convert.safetensors import SafetensorsSource, read_json
from lwm.convert.table import describe
from lwm.convert.weights import Weights
from lwm.data.tokenizer import load_tokenizer, tokenizer_files
from lwm.errors import UserError

# The first that exists is used. A tokenizer.json also has the tokens that were added later, and it
# is the one that transformers loads.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def read_hugging_face(directory: pathlib.Path, tokenizer: pathlib.Path | None = None) -> Weights:
  """The model in a directory that `save_pretrained` wrote, or a copy of one.

  Args:
    directory: holds config.json and safetensors.
    tokenizer: its file; default: the one in the directory.

  Raises:
    UserError: a file is missing or damaged, or the model is not supported.
  """
  config_path = directory / CONFIG
  settings = read_config(config_path, read_json(config_path))
  files = tokenizer_files(_tokenizer(directory, settings.model, tokenizer))
  source = SafetensorsSource(directory)
  _leave_out_redundant(source, settings.model)
  return Weights(
    name=directory.resolve().name,
    config=settings.model,
    rope_theta=settings.rope_theta,
    context=settings.context,
    source=source,
    table=table(settings.architecture, settings.model),
    tokenizer_files=files,
  )


def _tokenizer(
  directory: pathlib.Path, config: ModelConfig, path: pathlib.Path | None
) -> pathlib.Path:
  if path is None:
    paths = (directory / name for name in _TOKENIZERS)
    path = next((path for path in paths if path.exists()), None)
  if path is None:
    raise UserError(
      f"{directory} has neither {' nor '.join(_TOKENIZERS)}: name a tokenizer's file with "
      "--tokenizer."
    )
  size = load_tokenizer(path).vocab_size
  if size > config.text_vocab_size:
    raise UserError(
      f"{path} has {size} tokens, but the model in {directory} has {config.text_vocab_size} text "
      "ids: name the model's own tokenizer with --tokenizer."
    )
  return path


def _leave_out_redundant(source: SafetensorsSource, config: ModelConfig) -> None:
  """Removes tensors that follow from others or from the settings."""
  for name in list(source.tensors):
    if name.endswith(INVERSE_FREQUENCIES):
      source.leave_out(name)
  if config.tied_head and HEAD in source.tensors and EMBEDDING in source.tensors:
    if describe(source.read(HEAD)) != describe(source.read(EMBEDDING)):
      raise UserError(
        f"{source.path}: {HEAD} differs from {EMBEDDING}, but {CONFIG} says that they are tied: "
        "set tie_word_embeddings to false there."
      )
    source.leave_out(HEAD)
