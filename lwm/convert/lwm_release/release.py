"""LWM's releases of its models: reading and writing them; lwm_table.py has the names and settings.

A release is `params`, a stream of flax's msgpack, beside `tokenizer.model` (and `vqgan`, see
vqgan.py). It is named as LWM's programs name it, KIND::FILE:

  params             a stream of the parameters
  trainstate_params  a stream of a whole training state, of which only the parameters are read
  trainstate         the same
  flax_params        nested dictionaries of the parameters, in one msgpack
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lwm.checkpoint.arrays import ArrayInfo
from lwm.checkpoint.parameters import unfinished
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.config.model import ModelConfig
from lwm.convert.lwm_release.flax_file import (
  Keys,
  StoredArray,
  fits_record,
  index_stream,
  index_tree,
  read_array,
  write_record,
)
from lwm.convert.lwm_release.table import PRESETS, SCANNED, SIZES, Preset, Size, table
from lwm.convert.table import Shape, convert_out, parameter_shapes, their_shapes, write_manifest
from lwm.convert.weights import Weights
from lwm.data.tokenizer import tokenizer_files
from lwm.errors import UserError

KINDS = ("params", "trainstate_params", "trainstate", "flax_params")
_PARAMS = ("params", "params")


class ReleaseSource:
  """The tensors of a release, without a prefix; scanned layers are on axis 0, wherever they were.

  Attributes:
    path: of the file.
    tensors: shape and dtype by name, as in `table`.
    scanned: whether the layers are stacked.
  """

  def __init__(self, kind: str, path: pathlib.Path):
    """
    Args:
      kind: one of KINDS.
      path: the file.

    Raises:
      UserError: it is damaged, or is not of this kind.
    """
    self.path = path
    if kind == "flax_params":
      stored = index_tree(path)
    else:
      stored = index_stream(path, ((),) if kind == "params" else (_PARAMS,))
    self._stored: dict[str, StoredArray] = {}
    for keys, array in stored.items():
      name = "/".join(_without_prefix(keys))
      if name in self._stored:
        raise UserError(f"{path} holds {name} twice, with and without a prefix: keep one.")
      self._stored[name] = array
    self.scanned = any(_is_scanned(name) for name in self._stored)
    self._axis = self._scan_axis() if self.scanned else 0
    self.tensors: Mapping[str, ArrayInfo] = {
      name: ArrayInfo(self._from_axis(name, array.shape), array.dtype)
      for name, array in self._stored.items()
    }

  def read(self, name: str) -> np.ndarray:
    """One tensor."""
    array = read_array(self.path, self._stored[name])
    return np.moveaxis(array, self._axis, 0) if _is_scanned(name) else array

  def shape(self, name: str, dimensions: int) -> Shape:
    """The shape of a tensor. Raises UserError if the file lacks it or it has other dimensions."""
    found = self.tensors[name].shape if name in self.tensors else ()
    if len(found) != dimensions or not all(found):
      raise UserError(
        f"{self.path} lacks the tensor {name} of {dimensions} dimensions, so it is not a model of "
        "LWM's: check the file and what is before the :: in --input."
      )
    return found

  def _scan_axis(self) -> int:
    name = f"transformer/h/{SCANNED}/attention_norm/kernel"
    missing = StoredArray((), np.dtype(np.float32), ())
    norms = self._stored.get(name, missing).shape
    width = self._stored.get("transformer/ln_f/kernel", missing).shape
    if len(norms) != 2 or len(width) != 1 or width[0] not in norms:
      raise UserError(
        f"{self.path}: the tensors {name} and transformer/ln_f/kernel are missing or do not fit "
        "each other, so the number of layers is unknown: check the file."
      )
    if norms[0] == norms[1]:
      raise UserError(
        f"{self.path}: the tensor {name} has shape {norms}, so it does not tell on which axis the "
        "layers are: save the model with layers that are not scanned."
      )
    return norms.index(width[0]) ^ 1

  def _from_axis(self, name: str, shape: Shape) -> Shape:
    if not _is_scanned(name) or len(shape) <= self._axis:
      return shape
    return shape[self._axis], *shape[: self._axis], *shape[self._axis + 1 :]


def _is_scanned(name: str) -> bool:
  return name.startswith(f"transformer/h/{SCANNED}/")


def _without_prefix(keys: Keys) -> Keys:
  while keys[:1] == ("params",):
    keys = keys[1:]
  return keys


def is_release(name: str) -> bool:
  """Whether a name has the form KIND::FILE."""
  kind, separator, _ = name.partition("::")
  return bool(separator) and kind in KINDS


@dataclasses.dataclass(frozen=True)
class ReleaseOptions:
  """What a release does not say of its model.

  Attributes:
    preset: a name in PRESETS, which sets the next two.
    rope_theta: base of RoPE; None: the preset's.
    context: tokens; None: the preset's.
    num_heads: None: the number of LWM's model of the same size.
    tokenizer: its file; None: tokenizer.model beside the release.
  """

  preset: str | None = None
  rope_theta: float | None = None
  context: int | None = None
  num_heads: int | None = None
  tokenizer: pathlib.Path | None = None


def read_release(name: str, options: ReleaseOptions) -> Weights:
  """A release, ready to be converted.

  Args:
    name: KIND::FILE.
    options: settings.

  Raises:
    UserError: the file is damaged or not a model of LWM's, or a setting is missing or contradicts
      the file.
  """
  kind, _, file = name.partition("::")
  path = pathlib.Path(file)
  for flag in ("rope_theta", "context", "num_heads"):
    value = getattr(options, flag)
    if value is not None and not (value > 0 and math.isfinite(value)):
      raise UserError(f"--{flag}={value} must be a positive number.")
  source = ReleaseSource(kind, path)
  config = _config(source, options.num_heads)
  preset = _preset(path, config, options)
  tokenizer = options.tokenizer or path.with_name("tokenizer.model")
  if not tokenizer.is_file():
    raise UserError(f"There is no tokenizer {tokenizer}: name the model's with --tokenizer.")
  return Weights(
    name=options.preset or path.absolute().parent.name,
    config=config,
    rope_theta=preset.rope_theta,
    context=preset.context,
    source=source,
    table=table(config, source.scanned),
    tokenizer_files=tokenizer_files(tokenizer),
  )


def _config(source: ReleaseSource, num_heads: int | None) -> ModelConfig:
  layer = f"transformer/h/{SCANNED if source.scanned else 0}"
  text, width = source.shape("transformer/wte/embedding", 2)
  gate = source.shape(f"{layer}/feed_forward/w1/kernel", 3 if source.scanned else 2)
  feed_forward_width = gate[-1]
  if source.scanned:
    num_layers = gate[0]
  else:
    layers = {name.split("/")[2] for name in source.tensors if name.startswith("transformer/h/")}
    num_layers = len(layers)
  vte = "transformer/vte/embedding"
  vision = source.shape(vte, 2)[0] if vte in source.tensors else 0
  size = SIZES.get((num_layers, width, feed_forward_width), Size(0))
  num_heads = num_heads or size.num_heads
  if not num_heads:
    raise UserError(
      f"{source.path}: {num_layers} layers of width {width} and feed-forward width "
      f"{feed_forward_width} are none of LWM's sizes: give the number of heads with --num_heads."
    )
  if width % (2 * num_heads):
    raise UserError(
      f"{source.path}: --num_heads={num_heads} does not divide the width {width} into heads of an "
      "even size: give the number that the model was trained with."
    )
  return ModelConfig(
    num_layers=num_layers,
    width=width,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=width // num_heads,
    feed_forward_width=feed_forward_width,
    text_vocab_size=text,
    vision_vocab_size=vision,
    norm_epsilon=size.norm_epsilon,
  )


def _preset(path: pathlib.Path, config: ModelConfig, options: ReleaseOptions) -> Preset:
  """Theta and context from the options."""
  names = ", ".join(PRESETS)
  if options.preset is not None and options.preset not in PRESETS:
    raise UserError(f"--preset={options.preset} is not one of {names}.")
  preset = PRESETS[options.preset] if options.preset else None
  has_vision = bool(config.vision_vocab_size)
  if preset and preset.has_vision != has_vision:
    kind = "vision and text" if has_vision else "text alone"
    raise UserError(
      f"{path} is a model of {kind}, which --preset={options.preset} is not: name its own preset."
    )
  theta = options.rope_theta or (preset and preset.rope_theta)
  context = options.context or (preset and preset.context)
  if not theta or not context:
    raise UserError(
      f"{path} does not say the base of RoPE and the context that it was trained with: give "
      f"--rope_theta and --context, or --preset, one of {names}."
    )
  return Preset(theta, context, has_vision)


class ReleaseSink:
  """Writes a stream of LWM's; in a directory that is removed after an error."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def __enter__(self) -> "ReleaseSink":
    self._file = open(self._path, "wb")
    return self

  def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
    self._file.close()

  def write(self, name: str, array: np.ndarray) -> None:
    write_record(self._file, tuple(name.split("/")), array)


def export_release(
  stored: StoredCheckpoint, output: pathlib.Path, dtype: np.dtype | None = None
) -> None:
  """Writes a directory as LWM releases it: `params` and the tokenizer's files.

  The layers are scanned if each tensor then fits into a record, and apart otherwise: LWM's programs
  take the first with `scan_layers=True`, the second with `scan_layers=False`.

  Args:
    stored: a checkpoint of a run, or of imported weights.
    output: the directory.
    dtype: of all tensors; None: as they are stored.

  Raises:
    UserError: LWM's model cannot be this one, or the directory exists or cannot be written.
  """
  config = stored.experiment.model
  _check_architecture(stored.path, config)
  reader = stored.reader()
  dtypes = {path: dtype or info.dtype for path, info in reader.arrays.items()}
  rows, shapes = table(config, scanned=True), their_shapes(table(config, scanned=True), config)
  if not all(fits_record(shapes[row.name], dtypes[row.parts[0].path]) for row in rows):
    rows = table(config, scanned=False)
  their_dtypes = {row.name: dtypes[row.parts[0].path] for row in rows}
  with unfinished(output) as new:
    for name, content in tokenizer_files(stored.tokenizer_path).items():
      (new / name).write_bytes(content)
    with ReleaseSink(new / "params") as sink:
      manifest = convert_out(reader.read, rows, config, sink, their_dtypes.__getitem__)
    write_manifest(new, manifest)


def _check_architecture(path: pathlib.Path, config: ModelConfig) -> None:
  """Raises UserError, with a setting, if LWM's programs do not have such a model."""
  parameters = {part.path for row in table(config, scanned=False) for part in row.parts}
  if other := parameters ^ parameter_shapes(config).keys():
    raise UserError(
      f"{path} cannot become a model of LWM's, which differ in {sorted(other)[0]}: export it to "
      "another format."
    )
  plain = ModelConfig()
  settings = {
    "num_kv_heads": config.num_heads,
    "rope_scaling": plain.rope_scaling,
    "sliding_window": plain.sliding_window,
    "attention_soft_cap": plain.attention_soft_cap,
  }
  for name, value in settings.items():
    if getattr(config, name) != value:
      raise UserError(
        f"{path}: config.model.{name}={getattr(config, name)} is not {value}, as in every model of "
        "LWM's: export it to another format."
      )
