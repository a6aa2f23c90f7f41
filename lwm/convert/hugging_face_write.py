"""Writes a checkpoint as a directory that transformers and vLLM load.

A model with vision ids becomes a Llama of text and vision rows. Its config.json says which ids are
vision ids, its README.md how to sample frames, and its VQGAN is beside it.
"""

import importlib.resources
import json
import pathlib
from typing import Any

import numpy as np

from lwm.checkpoint.arrays import ArrayInfo
from lwm.checkpoint.parameters import unfinished
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.convert.hugging_face import table
from lwm.convert.hugging_face_config import Settings, architecture_of, write_config
from lwm.convert.hugging_face_read import CONFIG
from lwm.convert.safetensors import SafetensorsSink
from lwm.convert.table import convert_out, their_shapes, write_manifest
from lwm.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from lwm.errors import UserError

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SHARD_BYTES = 5 * 10**9


def export_hugging_face(
  stored: StoredCheckpoint,
  output: pathlib.Path,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes the model, its tokenizer, and a manifest of the tensors.

  Args:
    stored: the checkpoint.
    output: must not exist.
    dtype: of the tensors: float32, bfloat16 or float16. None: each as it is stored, which changes
      no bit; trained parameters are stored in float32.
    shard_bytes: size of a file of tensors, at most.

  Raises:
    UserError: no class of transformers computes what the model does, or the output exists or cannot
      be written; nothing is left then.
  """
  config = stored.experiment.model
  stage = stored.experiment.stages[stored.position.stage]
  settings = Settings(architecture_of(config), config, stage.rope_theta, stage.sequence_length)
  rows = table(settings.architecture, config)
  reader = stored.reader()
  dtypes = {
    tensor.name: np.dtype(dtype or np.result_type(*(reader.arrays[p.path].dtype for p in tensor.parts)))
    for tensor in rows
  }
  tensors = {
    name: ArrayInfo(shape, dtypes[name]) for name, shape in their_shapes(rows, config).items()
  }
  with unfinished(output) as new:
    generation = _write_tokenizer(new, stored.tokenizer_path, stage.sequence_length)
    marks = {name: generation.get(name) for name in ("bos_token_id", "eos_token_id")}
    config_dtype = np.result_type(*dtypes.values()).name
    _write_json(new / CONFIG, write_config(settings, config_dtype, marks, layout))
    with SafetensorsSink(new, tensors, shard_bytes) as sink:
      manifest = convert_out(reader.read, rows, config, sink, dtypes.__getitem__)
    write_manifest(new, manifest)
