"""Whether a compiled program anywhere reassembles a sequence that its mesh divides.

Two things in the optimised HLO of one device count. The first is an array of floats with at least
as many elements as the whole sequence has in one layer's residual stream, [sequence, width]. The
second is an all-gather along a mesh axis of the sequence, except where its result holds integers
(the rows of a batch, [B, S]: tokens, key intervals), is a part of a parameter (weights are gathered
for use), or has fewer elements than the sequence has tokens. All-reduces are treated alike, because
XLA uses them as gathers, of arrays that are zero outside a device's own part; but not those of
computations that XLA names all-reduce-scatter, which keep a device's own part of the sum. A
collective along `tensor` alone joins the tokens of one sequence shard: that is Megatron's sequence
parallelism.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\(", re.MULTILINE)
# Three ways to write replica groups: {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0) and mesh['a'=2,'b'=2] {'a'}.
_LISTS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\] \{([^}]*)\}")
# A whole computation, from its first line to the brace that ends it.
_SCATTER = re.compile(r"^%all-reduce-scatter\S* \(.*?^\}", re.MULTILINE | re.DOTALL)
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
    width: the model's width.
    num_layers: an array with this first dimension is stacked over layers, and counts as one layer.
    parameters: shapes of the parameters, including the dimension of layers where they are stacked.
    sequence_axes: the mesh axes that divide a sequence in attention.
  """

  def of_a_layer(shape):
    return math.prod(shape[1:] if len(shape) > 1 and shape[0] == num_layers else shape)

  # Sizes of one layer: all layers together are so large that one head of the whole sequence could
  # pass as a part of them.
  sizes = {of_a_layer(shape) for shape in parameters}
  devices = math.prod(mesh.values())
  scatters = [range(*match.span()) for match in _SCATTER.finditer(text)]
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
    is_scatter = any(match.start() in scatter for scatter in scatters)
    if operation.removesuffix("-start") in ("all-gather", "all-reduce") and not is_scatter:
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
  """The axes along which the devices in one group of the collective on this line differ.

  All axes, if the groups have an unknown form or if all devices form one group.
  """
  group = _first_group(line)
  if group is None:
    return [axis for axis, size in mesh.items() if size > 1]
  coordinates = np.unravel_index(group, tuple(mesh.values()))
  return [axis for axis, values in zip(mesh, coordinates) if len(set(values)) > 1]


def _first_group(line: str) -> np.ndarray | None:
  """Positions in the mesh of the devices in the first group."""
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
    # 'a':(2)4 is a part of an axis, and treated as all of it.
    named = re.findall(r"'(\w+)'", match[2])
    return ids[tuple(slice(None) if name in named else 0 for name in sizes)].reshape(-1)
  return None


def _integers(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]
