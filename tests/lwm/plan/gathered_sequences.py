"""Whether a compiled program anywhere puts a sequence together that its mesh divides.

What counts, of the optimised HLO of one device: an array of floats with as many elements as the
whole sequence has in one layer's residual stream, [sequence, width], or more; and an all-gather
along a mesh axis of the sequence whose result is neither integers (the rows of a batch, [B, S]:
tokens, key intervals) nor a part of a parameter (weights are gathered for use) nor has fewer
elements than the sequence has tokens. So with an all-reduce: XLA makes gathers of them, of arrays
that are zero but for a device's own part. A collective along `tensor` alone joins the tokens of one
sequence shard: that is Megatron's sequence parallelism.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\(", re.MULTILINE)
# Three ways to write them: {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0) and mesh['a'=2,'b'=2] {'a'}.
_LISTS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\] \{([^}]*)\}")
_INTEGERS = ("pred", "s", "u")


def gathered_sequences(
  text: str,
  mesh: Mapping[str, int],
  *,
  sequence_length: int,
  width: int,
  num_layers: int,
  parameters: Sequence[tuple[int, ...]],
  sequence_axes: Sequence[str] = ("ring", "ulysses"),
) -> list[str]:
  """The instructions that hold or gather a whole sequence of activations, each as one line.

  Args:
    text: `Compilation.text`.
    mesh: devices along each axis, in the order of the mesh.
    sequence_length: tokens of a row.
    width: of the model.
    num_layers: arrays with this first dimension are stacked over layers: one of them counts.
    parameters: shapes of the parameters, stacked ones as they are.
    sequence_axes: the mesh axes that divide a sequence in attention.
  """

  def of_a_layer(shape):
    return math.prod(shape[1:] if len(shape) > 1 and shape[0] == num_layers else shape)

  # Not of all layers, which are so large that a head of the whole sequence may be a part.
  sizes = {of_a_layer(shape) for shape in parameters}
  devices = math.prod(mesh.values())
  found = []
  for match in _INSTRUCTION.finditer(text):
    name, result, operation = match.groups()
    arrays = [
      (kind, tuple(int(n) for n in dims.split(",") if n))
      for kind, dims in _SHAPE.findall(result)
      if not kind.startswith(_INTEGERS)
    ]
    for kind, shape in arrays:
      if of_a_layer(shape) >= sequence_length * width:
        found.append(f"{name}: {kind}{list(shape)} holds a whole sequence ({operation})")
    if operation.removesuffix("-start") in ("all-gather", "all-reduce"):
      line = text[match.start() : text.find("\n", match.end())]
      crossed = set(crossed_axes(line, mesh)) & set(sequence_axes)
      for kind, shape in arrays:
        size = of_a_layer(shape)
        part = any(whole % size == 0 and devices % (whole // size) == 0 for whole in sizes)
        if crossed and not part and math.prod(shape) >= sequence_length:
          axes = " and ".join(sorted(crossed))
          found.append(f"{name}: {kind}{list(shape)} comes from {operation} over {axes}")
  return found


def crossed_axes(line: str, mesh: Mapping[str, int]) -> list[str]:
  """The axes along which the devices of one group of the collective on this line differ.

  Of groups in an unknown form, and where there is but one group: all.
  """
  group = _first_group(line)
  if group is None:
    return [axis for axis, size in mesh.items() if size > 1]
  coordinates = np.unravel_index(group, tuple(mesh.values()))
  return [axis for axis, values in zip(mesh, coordinates) if len(set(values)) > 1]


def _first_group(line: str) -> np.ndarray | None:
  """Positions of its devices in the mesh."""
  if match := _LISTS.search(line):
    return np.array(_integers(match[1]))
  if match := _IOTA.search(line):
    shape, source, order = match.groups()
    ids = np.arange(math.prod(_integers(source))).reshape(_integers(source))
    if order:
      ids = ids.transpose(_integers(order))
    return ids.reshape(_integers(shape))[0]
  if match := _MESH.search(line):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    ids = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
    # 'a':(2)4 is a part of an axis: taken for the whole.
    named = re.findall(r"'(\w+)'", match[2])
    return ids[tuple(slice(None) if name in named else 0 for name in sizes)].reshape(-1)
  return None


def _integers(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]
