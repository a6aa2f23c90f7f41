"""Conversion by a table: which tensor of a format holds which of our parameters, and how.

A format is a list of rows, one `Tensor` for each tensor of theirs. The same rows convert in both
directions, one tensor at a time. A tensor that no row names, or a row without its tensor, is an
error.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lwm import model as model_lib
from lwm.checkpoint.arrays import ArrayInfo, ArrayWriter, Index
from lwm.config.model import EXPERTS, ModelConfig
from lwm.convert.tensors import Sink, Source
from lwm.errors import UserError

# Shapes and hashes of the tensors that were converted, beside the converted model.
MANIFEST = "manifest.json"

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """How one of our arrays becomes (a part of) one of theirs, and back.

  Attributes:
    their_shape: from our shape, without the axis of layers, to theirs.
    to_theirs: from our array to theirs.
    to_ours: from their array and our shape to our array.
  """

  their_shape: Callable[[Shape], Shape]
  to_theirs: Callable[[np.ndarray], np.ndarray]
  to_ours: Callable[[np.ndarray, Shape], np.ndarray]


SAME = Transform(
  their_shape=lambda shape: shape, to_theirs=lambda array: array, to_ours=lambda array, shape: array
)

# A vector per head, [H, D], which theirs hold as one vector.
FLAT = Transform(
  their_shape=lambda shape: (math.prod(shape),),
  to_theirs=lambda array: array.reshape(-1),
  to_ours=lambda array, shape: array.reshape(shape),
)


def linear(in_axes: int = 1) -> Transform:
  """torch's linear layers: ours is [in..., out...], theirs [prod(out), prod(in)].

  Args:
    in_axes: number of our axes that are summed over.
  """

  def their_shape(shape: Shape) -> Shape:
    return math.prod(shape[in_axes:]), math.prod(shape[:in_axes])

  return Transform(
    their_shape=their_shape,
    to_theirs=lambda array: array.reshape(their_shape(array.shape)[::-1]).T,
    to_ours=lambda array, shape: array.T.reshape(shape),
  )


@dataclasses.dataclass(frozen=True)
class Part:
  """One of our parameters, or a part of it, inside a tensor of theirs.

  Attributes:
    path: of the parameter, dotted: "blocks.attention.query".
    transform: between ours and theirs.
    where: which part of the parameter. For one layer of a stretch: its index on the first axis;
      for an expert, its index on the second one too.
  """

  path: str
  transform: Transform = SAME
  where: Index = ()

  def shape(self, whole: Shape) -> Shape:
    """The part's shape, given the whole parameter's."""
    return np.broadcast_to(np.empty(()), whole)[self.where].shape


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of theirs: its parts, one after the other along its first axis."""

  name: str
  parts: tuple[Part, ...]


# Rows of one layer: (their name, with {layer}; our names inside the block; the transform). A name
# with {expert} stands for one row per expert, whose axis is the first one of our parameter.
LayerRow = tuple[str, tuple[str, ...], Transform]


def layer_rows(
  config: ModelConfig, rows: Sequence[LayerRow], expert_rows: Sequence[LayerRow] = ()
) -> list[Tensor]:
  """The rows of all layers, over the stretches of the model.

  Args:
    config: of the model.
    rows: of its dense layers.
    expert_rows: of its layers of experts.
  """
  tensors = []
  first = 0
  for index, stretch in enumerate(config.resolved_stretches):
    blocks = model_lib.stretch_name(index)
    for layer in range(stretch.num_layers):
      for name, ours, transform in expert_rows if stretch.kind == EXPERTS else rows:
        per_expert = "{expert}" in name
        for expert in range(config.experts.num_experts if config.experts and per_expert else 1):
          where = (layer, expert) if per_expert else (layer,)
          parts = tuple(Part(f"{blocks}.{path}", transform, where) for path in ours)
          tensors.append(Tensor(name.format(layer=first + layer, expert=expert), parts))
    first += stretch.num_layers
  return tensors


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
  """Shapes of all parameters of a model, by dotted path.

  Tables are without rows of padding, and loads of experts (`ExpertsConfig.placement`) are not
  parameters that another format holds.
  """
  experts = config.experts and dataclasses.replace(config.experts, placement="home")
  config = dataclasses.replace(config, vocab_multiple=1, experts=experts)
  abstract = model_lib.build(config).abstract()
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
  }


def their_shapes(table: Sequence[Tensor], config: ModelConfig) -> dict[str, Shape]:
  """The shape of each tensor of theirs, by name.

  Raises:
    UserError: the model has adapters, which no format has.
    AssertionError: the table does not hold each of our parameters exactly once.
  """
  if config.adapter:
    raise UserError(
      "The model has config.model.adapter, which this format cannot hold: use --format=orbax or "
      "--format=stablehlo."
    )
  ours = parameter_shapes(config)
  held: dict[str, int] = {}
  for part in (part for tensor in table for part in tensor.parts):
    held[part.path] = held.get(part.path, 0) + math.prod(part.shape(ours[part.path]))
  sizes = {path: math.prod(shape) for path, shape in ours.items()}
  assert held == sizes, {path for path, size in sizes.items() if held.get(path) != size}
  return {tensor.name: _their_shape(tensor, ours) for tensor in table}


def arrays_of(source: Source, table: Sequence[Tensor], config: ModelConfig) -> dict[str, ArrayInfo]:
  """Checks a source against the table, and returns the arrays that it converts to.

  A parameter has the dtype of its tensors, or float32 if theirs differ.

  Raises:
    UserError: a tensor is missing, is not in the table, or has another shape.
  """
  expected = their_shapes(table, config)
  if missing := [name for name in expected if name not in source.tensors]:
    raise UserError(
      f"{source.path} lacks the tensor {missing[0]}{_others(missing)}: get all files of the model."
    )
  if unknown := [name for name in source.tensors if name not in expected]:
    raise UserError(
      f"{source.path} holds the tensor {unknown[0]}{_others(unknown)}, which a model of its "
      "settings does not have: check the settings, because a tensor that is not read is lost."
    )
  for name, shape in expected.items():
    if source.tensors[name].shape != shape:
      raise UserError(
        f"{source.path}: the tensor {name} has shape {source.tensors[name].shape}, but the model's "
        f"settings make it {shape}: check the settings and the file."
      )
  shapes = parameter_shapes(config)
  dtypes: dict[str, set[np.dtype]] = {path: set() for path in shapes}
  for tensor in table:
    for part in tensor.parts:
      dtypes[part.path].add(source.tensors[tensor.name].dtype)
  return {path: ArrayInfo(shape, common_dtype(dtypes[path])) for path, shape in shapes.items()}


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
  """The dtype of all of them, or float32, which holds every number of the others."""
  kinds = set(dtypes)
  return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def convert_in(
  source: Source, table: Sequence[Tensor], writer: ArrayWriter, arrays: Mapping[str, ArrayInfo]
) -> dict[str, dict[str, Any]]:
  """Reads every tensor and writes our parameters.

  Args:
    source: checked by `arrays_of`.
    table: of its format.
    writer: of the new checkpoint.
    arrays: what `arrays_of` returned.

  Returns:
    The manifest: shape, dtype and SHA-256 of each tensor of theirs.
  """
  manifest = {}
  for tensor in table:
    array = source.read(tensor.name)
    manifest[tensor.name] = describe(array)
    start = 0
    for part in tensor.parts:
      info = arrays[part.path]
      shape = part.shape(info.shape)
      stop = start + part.transform.their_shape(shape)[0]
      ours = part.transform.to_ours(array[start:stop], shape)
      writer.write(part.path, ours.astype(info.dtype), part.where)
      start = stop
  return manifest


def convert_out(
  read: Callable[[str, Index], np.ndarray],
  table: Sequence[Tensor],
  config: ModelConfig,
  sink: Sink,
  dtype: Callable[[str], np.dtype],
) -> dict[str, dict[str, Any]]:
  """Reads every parameter of ours and writes their tensors.

  Args:
    read: reads our parameters, as `ArrayReader.read` does.
    table: of the format.
    config: of the model. Rows of tables after its vocabulary, which are padding, are cut.
    sink: of the new files.
    dtype: of each tensor of theirs, by its name.

  Returns:
    The manifest, as `convert_in` returns it.
  """
  manifest = {}
  shapes = parameter_shapes(config)
  for tensor in table:
    parts = []
    for part in tensor.parts:
      shape = part.shape(shapes[part.path])
      array = read(part.path, part.where)[tuple(map(slice, shape))]
      parts.append(part.transform.to_theirs(array))
    array = parts[0] if len(parts) == 1 else np.concatenate(parts)
    array = np.ascontiguousarray(array, dtype(tensor.name))
    sink.write(tensor.name, array)
    manifest[tensor.name] = describe(array)
  return manifest


def describe(array: np.ndarray) -> dict[str, Any]:
  """What a manifest says of a tensor."""
  data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  digest = hashlib.sha256(data.data).hexdigest()
  return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest}


def write_manifest(directory: pathlib.Path, tensors: Mapping[str, Any]) -> None:
  """Writes the manifest of a conversion into the directory of its result."""
  (directory / MANIFEST).write_text(json.dumps(tensors, indent=1) + "\n")


def _their_shape(tensor: Tensor, ours: Mapping[str, Shape]) -> Shape:
  shapes = [part.transform.their_shape(part.shape(ours[part.path])) for part in tensor.parts]
  return sum(shape[0] for shape in shapes), *shapes[0][1:]


def _others(names: Sequence[str]) -> str:
  return f" and {len(names) - 1} more" if len(names) > 1 else ""
