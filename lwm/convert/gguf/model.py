"""GGUF, the format of llama.cpp: models in and out, with their tokenizers."""

import json
import pathlib
from collections.abc import Callable

import numpy as np

from lwm.checkpoint.arrays import Index
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.config.model import ModelConfig
from lwm.convert.gguf.file import GGUFSource
from lwm.convert.gguf.names import table
from lwm.convert.gguf.settings import (
  GGUFModel,
  architecture_of,
  model_metadata,
  read_model,
  rope_factors,
)
from lwm.convert.gguf.sink import FILE_TYPES, GGUFSink
from lwm.convert.gguf.tokenizer import read_tokenizer
from lwm.convert.gguf.vocabulary import tokenizer_metadata
from lwm.convert.table import MANIFEST, convert_out, their_shapes
from lwm.convert.weights import Weights
from lwm.errors import UserError


def export_gguf(stored: StoredCheckpoint, path: pathlib.Path, file_type: str) -> list[str]:
  """Writes a checkpoint as a GGUF file.

  Args:
    stored: the checkpoint.
    path: the file; must not exist.
    file_type: a key of `lwm.convert.gguf.sink.FILE_TYPES`.

  Returns:
    Sentences about what a user may not expect; usually none.

  Raises:
    UserError: no architecture of GGUF has this model, the tokenizer or a value cannot be expressed,
      there is no such type, or the disk is full.
  """
  if file_type not in FILE_TYPES:
    raise UserError(f"--type={file_type} is not one of {', '.join(FILE_TYPES)}.")
  stage = stored.stage
  model = describe_model(
    stored.experiment.name, stored.experiment.model, stage.rope_theta, stage.sequence_length
  )
  return write_gguf(path, model, stored.tokenizer_path, stored.reader().read, file_type)


def read_gguf(path: pathlib.Path) -> Weights:
  """A GGUF file, ready to be imported.

  Raises:
    UserError: it is damaged, or something in it is not supported.
  """
  source = GGUFSource(path)
  model = read_model(source)
  config = model.config
  return Weights(
    name=model.name,
    config=config,
    rope_theta=model.rope_theta,
    context=model.context_length,
    source=source,
    table=table(config, model.architecture),
    tokenizer_files=read_tokenizer(
      path, source.metadata, config.vocab_size, config.text_vocab_size
    ),
  )


def describe_model(
  name: str, config: ModelConfig, rope_theta: float, context_length: int
) -> GGUFModel:
  """Our model as `write_gguf` takes it. Raises UserError if no architecture of GGUF has it."""
  return GGUFModel(architecture_of(config), name, config, rope_theta, context_length)


def write_gguf(
  path: pathlib.Path,
  model: GGUFModel,
  tokenizer: pathlib.Path,
  read: Callable[[str, Index], np.ndarray],
  file_type: str,
) -> list[str]:
  """Writes a GGUF file, which exists complete or not at all, and a manifest beside it.

  The manifest, PATH.manifest.json, has the shape, dtype and hash of each tensor before it is
  quantised.

  Args:
    path: the file; must not exist.
    model: what `describe_model` returns.
    tokenizer: its tokenizer's file.
    read: reads its parameters, as `ArrayReader.read` does.
    file_type: a key of `lwm.convert.gguf.sink.FILE_TYPES`.

  Returns:
    Sentences about what a user may not expect; usually none.

  Raises:
    UserError: the tokenizer or a value cannot be expressed, or the disk is full.
  """
  config = model.config
  rows = table(config, model.architecture)
  metadata = model_metadata(model) | tokenizer_metadata(tokenizer, config)
  sink = GGUFSink(path, metadata, their_shapes(rows, config), file_type, rope_factors(model))
  with sink:
    manifest = convert_out(read, rows, config, sink, sink.dtype)
    sink.write_beside(MANIFEST, json.dumps(manifest, indent=1) + "\n")
  notes = list(sink.notes)
  if config.sliding_window is not None:
    notes.append(
      f"runtimes that ignore {model.architecture}.attention.sliding_window attend to all tokens"
    )
  return notes
