"""Writes a checkpoint as a directory that transformers and vLLM load.

A model with vision ids becomes a Llama of text and vision rows. Its config.json says which ids are
vision ids, and its README.md how to sample frames.

transformers 5 takes Qwen2's own tokenizer class for every model of type qwen2, which a model with
attention_bias becomes. Load another tokenizer of such a model with PreTrainedTokenizerFast.
"""

import json
import pathlib
from typing import Any

import numpy as np
import sentencepiece

from lwm.checkpoint.arrays import ArrayInfo
from lwm.checkpoint.parameters import unfinished
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.convert.hugging_face.config import CONFIG, Settings, architecture_of, write_config
from lwm.convert.hugging_face.names import table
from lwm.convert.hugging_face.readme import VQGAN, readme
from lwm.convert.safetensors import SHARD_BYTES, SafetensorsSink, read_json
from lwm.convert.table import common_dtype, convert_out, their_shapes, write_manifest
from lwm.convert.vqgan.model import write_vqmodel
from lwm.data.tokenizer import GENERATION_CONFIG, TOKENIZER_CONFIG, load_tokenizer, tokenizer_files
from lwm.errors import UserError
from lwm.vision.codec import Codec


def export_hugging_face(
  stored: StoredCheckpoint,
  output: pathlib.Path,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
  vqgan: pathlib.Path | None = None,
) -> None:
  """Writes the model, its tokenizer and a manifest of the tensors.

  Rows of tables that pad the vocabulary are cut.

  Args:
    stored: the checkpoint.
    output: must not exist.
    dtype: of the tensors: float32, bfloat16 or float16. None: each as it is stored, so that no bit
      is lost; parameters that were trained here are stored in float32.
    shard_bytes: size of a file of tensors, at most.
    vqgan: the file of the VQGAN whose codes the vision ids are; models with vision ids need it.

  Raises:
    UserError: no class of transformers computes what the model does, or the output exists or cannot
      be written; nothing is left then.
  """
  config, stage = stored.experiment.model, stored.stage
  codec = _codec(stored, vqgan)
  settings = Settings(architecture_of(config), config, stage.rope_theta, stage.sequence_length)
  rows, reader = table(settings.architecture, config), stored.reader()
  stored_dtypes = {
    row.name: common_dtype(reader.arrays[part.path].dtype for part in row.parts) for row in rows
  }
  tensors = {
    name: ArrayInfo(shape, np.dtype(dtype) if dtype else stored_dtypes[name])
    for name, shape in their_shapes(rows, config).items()
  }
  whole_dtype = common_dtype(info.dtype for info in tensors.values()).name
  with unfinished(output) as new:
    marks = _write_tokenizer(new, stored.tokenizer_path, settings.context)
    layout = codec.config.layout if codec else None
    _write_json(new / CONFIG, write_config(settings, whole_dtype, marks, layout))
    if codec:
      (new / "README.md").write_text(readme(settings, codec.config))
      (new / VQGAN).mkdir()
      write_vqmodel(codec, new / VQGAN)
    with SafetensorsSink(new, tensors, shard_bytes) as sink:
      manifest = convert_out(reader.read, rows, config, sink, lambda name: tensors[name].dtype)
    write_manifest(new, manifest)


def _codec(stored: StoredCheckpoint, vqgan: pathlib.Path | None) -> Codec | None:
  """The VQGAN of a model with vision ids."""
  vision_ids = stored.experiment.model.vision_vocab_size
  if not vision_ids:
    return None
  if vqgan is None:
    raise UserError(
      f"{stored.path} has vision ids, which mean nothing without the VQGAN that they are codes of: "
      "name its file with --vqgan."
    )
  codec = Codec(vqgan)
  if codec.config.layout.vocab_size != vision_ids:
    raise UserError(
      f"{vqgan} needs {codec.config.layout.vocab_size} vision ids, but {stored.path} has "
      f"{vision_ids}: name the VQGAN that its data was made with."
    )
  return codec


def _write_tokenizer(directory: pathlib.Path, path: pathlib.Path, context: int) -> dict[str, Any]:
  """Writes the tokenizer with its settings; returns the ids that begin and end a text.

  Settings that came with an imported model are copied as they are.
  """
  content, *settings = tokenizer_files(path).items()
  tokenizer = load_tokenizer(path)
  kind = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
  (directory / kind).write_bytes(content[1])
  for name, text in settings:
    (directory / name).write_bytes(text)
  if not (directory / TOKENIZER_CONFIG).exists():
    names = {index: name for name, index in tokenizer.marks.items()}
    marks = {"bos_token": names[tokenizer.bos_id], "eos_token": names[tokenizer.eos_id]}
    made = {"model_max_length": context, "clean_up_tokenization_spaces": False, **marks}
    if kind == "tokenizer.json":
      made["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
      model = sentencepiece.SentencePieceProcessor(model_file=str(path))
      made |= {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": model.id_to_piece(model.unk_id()),
        "add_bos_token": True,
        "add_eos_token": False,
        # Whether the model was trained to begin a text with a space.
        "add_prefix_space": model.encode("a", out_type=str)[0].startswith("\u2581"),
        "legacy": False,
      }
    _write_json(directory / TOKENIZER_CONFIG, made)
  ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
  generation = directory / GENERATION_CONFIG
  if generation.exists():
    return {name: read_json(generation).get(name, index) for name, index in ids.items()}
  _write_json(generation, ids)
  return ids


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n")
