"""PEFT's format of LoRA adapters: `adapter_config.json` and `adapter_model.safetensors`.

PEFT names the matrices after transformers' modules and stores them as torch's linear layers, [out,
in]. Its scale is ours: lora_alpha / r.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from lwm.checkpoint.arrays import ArrayInfo, layers
from lwm.checkpoint.parameters import unfinished, write_parameters
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.config.model import LoraConfig, ModelConfig
from lwm.convert.safetensors import SafetensorsSink, SafetensorsSource, read_json
from lwm.convert.table import LayerRow, Tensor, convert_out, layer_rows, linear, parameter_shapes
from lwm.data.tokenizer import tokenizer_files
from lwm.errors import UserError
from lwm.model import lora as lora_lib

CONFIG = "adapter_config.json"
STEM = "adapter_model"

_LAYER = "base_model.model.model.layers.{layer}."
# By our name: the module that holds our projection, theirs, and the number of input axes.
_PROJECTIONS = {
  "query": ("attention", "self_attn.q_proj", 1),
  "key": ("attention", "self_attn.k_proj", 1),
  "value": ("attention", "self_attn.v_proj", 1),
  "out": ("attention", "self_attn.o_proj", 2),
  "gate": ("feed_forward", "mlp.gate_proj", 1),
  "up": ("feed_forward", "mlp.up_proj", 1),
  "down": ("feed_forward", "mlp.down_proj", 1),
}
# Settings that change what an adapter computes, and their values that mean LoRA without extras.
_PLAIN: dict[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "use_dora": (False, None),
  "modules_to_save": (None, []),
  "rank_pattern": ({}, None),
  "alpha_pattern": ({}, None),
  "layers_to_transform": (None, []),
  "fan_in_fan_out": (False, None),
  "layer_replication": (None, []),
  "alora_invocation_tokens": (None, []),
  "use_qalora": (False, None),
  "use_bdlora": (None, False),
}


def is_adapter(path: pathlib.Path) -> bool:
  """Whether a path is the directory of an adapter."""
  return (path / CONFIG).is_file()


def adapter_table(config: ModelConfig) -> list[Tensor]:
  """Their tensor of each matrix that `config.lora` adds."""
  assert config.lora
  rows: list[LayerRow] = []
  for target in config.lora.targets:
    module, theirs, num_inputs = _PROJECTIONS[target]
    for suffix, name, transform in (
      (lora_lib.A, "lora_A", linear(num_inputs)),
      (lora_lib.B, "lora_B", linear()),
    ):
      ours = (f"{module}.{target}{suffix}",)
      rows.append((f"{_LAYER}{theirs}.{name}.weight", ours, transform))
  return layer_rows(config, rows)


def export_adapter(stored: StoredCheckpoint, output: pathlib.Path, base: str = "") -> None:
  """Writes the additions of a tuned model alone, as float32.

  Args:
    stored: a checkpoint of a model with LoRA.
    output: the directory to write; must not exist.
    base: path or name of the base in transformers' format, for PEFT; may be empty.

  Raises:
    UserError: the model has no LoRA, or the output exists or cannot be written.
  """
  model = stored.experiment.model
  if model.lora is None:
    raise UserError(f"{stored.path} holds a model without LoRA: export it in another format.")
  table = adapter_table(model)
  infos = {name: ArrayInfo(shape, np.dtype(np.float32)) for name, shape in _shapes(model).items()}
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": model.lora.rank,
    "lora_alpha": model.lora.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": [_PROJECTIONS[name][1].split(".")[1] for name in model.lora.targets],
    "inference_mode": True,
  }
  reader = stored.reader()
  with unfinished(output) as new:
    size = sum(info.nbytes for info in infos.values())
    with SafetensorsSink(new, infos, size, STEM) as sink:
      convert_out(reader.read, table, model, sink, lambda name: infos[name].dtype)
    (new / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def import_adapter(adapter: pathlib.Path, base: StoredCheckpoint, output: pathlib.Path) -> None:
  """Writes a checkpoint of a base with an adapter beside its parameters.

  Args:
    adapter: the adapter's directory.
    base: a checkpoint of the model that the adapter was trained for, without LoRA.
    output: the checkpoint; must not exist.

  Raises:
    UserError: the adapter is damaged, is not plain LoRA or does not fit the base, or the output
      exists or cannot be written.
  """
  experiment = base.experiment
  if experiment.model.lora:
    raise UserError(f"{base.path} already has LoRA: merge it first, by exporting the model.")
  source = SafetensorsSource(adapter, STEM)
  model = dataclasses.replace(experiment.model, lora=_lora(adapter, source))
  table, shapes = adapter_table(model), _shapes(model)
  for name in sorted(shapes.keys() | source.tensors.keys()):
    if name not in shapes:
      raise UserError(f"{adapter} holds the tensor {name}, which {base.path} has no place for.")
    found = source.tensors.get(name)
    if found is None or found.shape != shapes[name]:
      what = f"has shape {found.shape}" if found else "is missing"
      raise UserError(
        f"{adapter}: the tensor {name} {what}, but for {base.path} its shape is {shapes[name]}: "
        "name the base that the adapter was trained for."
      )
  reader, ours = base.reader(), parameter_shapes(model)
  added = {
    part.path: ArrayInfo(ours[part.path], np.dtype(np.float32))
    for tensor in table
    for part in tensor.parts
  }
  files = tokenizer_files(base.tokenizer_path)
  experiment = dataclasses.replace(
    experiment, model=model, stages=[base.stage], tokenizer=next(iter(files))
  )
  with write_parameters(output, experiment, files, reader.arrays | added) as writer:
    for path, info in reader.arrays.items():
      for where in layers(path, info.shape):
        writer.write(path, reader.read(path, where), where)
    for tensor in table:
      (part,) = tensor.parts
      array = part.transform.to_ours(source.read(tensor.name), part.shape(ours[part.path]))
      writer.write(part.path, array.astype(np.float32), part.where)


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of each tensor of an adapter, in the order of the table."""
  ours = parameter_shapes(model)
  return {
    tensor.name: part.transform.their_shape(part.shape(ours[part.path]))
    for tensor in adapter_table(model)
    for part in tensor.parts
  }


def _lora(adapter: pathlib.Path, source: SafetensorsSource) -> LoraConfig:
  """The settings of an adapter; its tensors say which projections it changes."""
  path = adapter / CONFIG
  settings = read_json(path)
  for name, plain in _PLAIN.items():
    if settings.get(name, plain[0]) not in plain:
      raise UserError(
        f"{path}: {name}={settings[name]!r} is not supported; merge the adapter with PEFT's "
        "merge_and_unload and import the merged model."
      )
  rank, alpha = settings.get("r"), settings.get("lora_alpha")
  if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not alpha > 0:
    raise UserError(f"{path}: r={rank!r} and lora_alpha={alpha!r} must be positive numbers.")
  if settings.get("use_rslora"):
    # Rank-stabilised LoRA scales by alpha / sqrt(r) (arXiv 2312.03732).
    alpha *= rank**0.5
  names = {name.removesuffix(".lora_A.weight").split(".", 5)[-1] for name in source.tensors}
  targets = [ours for ours, (_, theirs, _) in _PROJECTIONS.items() if theirs in names]
  if not targets:
    raise UserError(f"{adapter} changes none of the projections of a decoder's layers.")
  return LoraConfig(rank, float(alpha), targets)
