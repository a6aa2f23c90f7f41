"""The mesh axes, and which of them carries which dimension. No other file names a mesh axis.

Parameters and activations name their dimensions by logical axes ("model", "heads", "sequence");
`ShardingRules` maps those to mesh axes. All mesh axes are explicit: JAX keeps the sharding in the
type of every array and refuses to guess.

To add a mesh axis, add a field to `MeshConfig`, in the order of the mesh, and name it in the rules
of the dimensions that it carries.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lwm.errors import ConfigError

LogicalAxes = tuple[str | None, ...]


@dataclasses.dataclass
class MeshConfig:
  """Devices along each mesh axis; one axis may be -1: all remaining devices."""

  data: int = 1
  fsdp: int = -1
  # Devices that divide the experts of a layer, together with ulysses. For everything else this axis
  # is like fsdp.
  expert: int = 1
  ring: int = 1
  # Neighbours inside a ring shard that exchange heads for tokens: sequences are divided over
  # ring x ulysses.
  ulysses: int = 1
  tensor: int = 1

  def axis_sizes(self) -> dict[str, int]:
    """Sizes by axis, in the order of the mesh, as configured."""
    return dataclasses.asdict(self)

  def resolve(self, num_devices: int) -> dict[str, int]:
    """Sizes by axis, with -1 filled in.

    Raises:
      ConfigError: the sizes are wrong or do not use exactly `num_devices` devices.
    """
    sizes = self.axis_sizes()
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
      raise ConfigError(f"mesh ({text}): sizes must be at least 1, and at most one axis may be -1.")
    if num_devices % fixed or (not free and fixed != num_devices):
      raise ConfigError(
        f"mesh ({text}) does not divide the {num_devices} devices here, because its fixed axes "
        f"multiply to {fixed}: change config.stages[i].mesh or the number of devices."
      )
    if free:
      sizes[free[0]] = num_devices // fixed
    return sizes


# The mesh axes, in the order of the mesh: devices that differ only in the last one are neighbours.
AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """The mesh axes of each logical axis; None means replicated.

  `model` is the width of the model in a parameter: parameters are stored in shards of it and
  gathered for use. The width of an activation has no logical axis, because it is never sharded.

  Attributes:
    model: axes over which parameters are stored in shards, except those of experts, which are
      stored in shards over the axes of `model` that are not in `experts`.
    batch: axes over which the rows of a batch are divided.
    sequence: (ring, ulysses), the axes over which sequences are divided: the ring and, inside it,
      the neighbours that exchange heads for tokens (kernels/ulysses). None keeps sequences whole.
    tensor: the axis over which heads, feed-forward widths and vocabularies are divided.
    experts: axes over which experts are divided. Attention uses the same devices otherwise: it
      divides rows over the first axis, and exchanges heads for tokens along the second one. Axes
      that divide tokens must come before others.
    expert: the one of these axes that dense models do not need, because it is like fsdp for them.
    cache: axes over which the positions of a sampler's key/value cache are divided.
    slices: the only axis that may cross from one TPU slice to the next, over the slower network.
    stationary: whether the linear maps are computed where the shards of their weights are stored,
      and activations travel instead of weights. It suits few tokens, and sequences must be whole.
  """

  model: tuple[str, ...] = ("fsdp", "expert", "ring", "ulysses")
  batch: tuple[str, ...] = ("data", "fsdp", "expert")
  sequence: tuple[str, str] | None = ("ring", "ulysses")
  tensor: str = "tensor"
  experts: tuple[str, ...] = ("expert", "ulysses")
  cache: tuple[str, ...] = ()
  expert: str = "expert"
  slices: str = "data"
  stationary: bool = False

  # Logical axes that are never sharded.
  layers: ClassVar[None] = None
  head_dim: ClassVar[None] = None

  @classmethod
  def inference(cls, few_tokens: bool) -> "ShardingRules":
    """The rules by which an engine reads and generates tokens (lwm/infer).

    Parameters and the positions of the cache are divided over all axes but `data`. Both kinds of
    rules divide them in the same way, so programs of both kinds can use the same arrays.

    Args:
      few_tokens: tokens are few, as in a step of generation: weights stay where they are. If not,
        sequences are divided too, and weights are gathered for use.
    """
    # Rows are not divided over `expert`, and sequences are divided over `ulysses`.
    rules = cls(batch=("data",), cache=cls.model, experts=("ulysses", "expert"))
    if few_tokens:
      return dataclasses.replace(rules, sequence=None, stationary=True)
    return rules

  @property
  def ring(self) -> str:
    """The axis of the ring, if sequences are divided."""
    assert self.sequence is not None
    return self.sequence[0]

  @property
  def ulysses(self) -> str:
    """The axis along which heads are exchanged for tokens, if sequences are divided."""
    assert self.sequence is not None
    return self.sequence[1]

  @property
  def heads(self) -> str:
    return self.tensor

  @property
  def kv_heads(self) -> str:
    return self.tensor

  @property
  def feed_forward(self) -> str:
    return self.tensor

  @property
  def vocab(self) -> str:
    return self.tensor

  @property
  def expert_model(self) -> tuple[str, ...]:
    """The axes of the width of the model in a parameter of experts."""
    return tuple(axis for axis in self.model if axis not in self.experts)

  @property
  def expert_feed_forward(self) -> str | None:
    """The axis of the widths of experts: they are whole if `tensor` divides the experts."""
    return None if self.tensor in self.experts else self.tensor

  @property
  def residual(self) -> tuple[str, ...] | None:
    """The axes of the sequence of the residual stream, between the layers of a block.

    The residual stream is divided over `tensor` too (Megatron's sequence parallelism, arXiv
    2205.05198), over which attention and feed-forward divide their heads and widths. None if
    sequences are whole.
    """
    return self.sequence and (*self.sequence, self.tensor)

  @property
  def token_axes(self) -> tuple[str, ...]:
    """The mesh axes that the tokens of attention and feed-forward are divided over."""
    return (*self.batch, *(self.sequence or ()))

  @property
  def residual_axes(self) -> tuple[str, ...]:
    """The mesh axes that the tokens of the residual stream are divided over."""
    return (*self.batch, *(self.residual or ()))

  def spec(self, *logical_axes: str | None) -> PartitionSpec:
    """The partition of an array with these dimensions."""
    return PartitionSpec(*(axis and getattr(self, axis) for axis in logical_axes))

  def gathered(self, *logical_axes: str | None, whole: bool = False) -> PartitionSpec:
    """The partition of a parameter in use: whole along `model`, still sharded over `tensor`.

    The parameters of experts are whole along `expert_model` and still sharded over `experts`. The
    other axes of the tokens are `reduced`: all shards of the tokens use the same copy, and its
    gradient is a sum over them that has not been taken yet.

    Args:
      *logical_axes: the dimensions of the parameter.
      whole: whether the parameter is whole along `tensor` too, for tokens that are divided over it.
    """
    axes = (None if whole or axis in _STORED else axis for axis in logical_axes)
    shared = {*self.token_axes, *((self.tensor,) if whole else ())}
    if "experts" in logical_axes:
      shared -= {*self.experts}
    # jax 0.11.2 cannot lower a shard_map with sums not yet taken on a mesh of one device.
    alone = jax.sharding.get_abstract_mesh().size == 1
    return PartitionSpec(*self.spec(*axes), reduced=set() if alone else shared)

  def gather(
    self, weight: jax.Array, dtype: DTypeLike, *logical_axes: str | None, whole: bool = False
  ) -> jax.Array:
    """Casts a float32 parameter and gathers it for use, see `gathered`.

    The program states this explicitly, because XLA might otherwise gather the activations instead.
    The gradient is reduce-scattered over the gathered axes and summed over the other axes of the
    tokens, in float32 for every `dtype`.
    """
    return _gather(weight, jnp.dtype(dtype), self, logical_axes, whole)

  def tree_shardings(self, logical_axes: Any, mesh: Mesh) -> Any:
    """Maps a tree whose leaves are tuples of logical axes to a tree of NamedShardings."""
    return jax.tree.map(
      lambda axes: NamedSharding(mesh, self.spec(*axes)),
      logical_axes,
      is_leaf=lambda node: isinstance(node, tuple),
    )


# Logical axes along which a parameter in use is whole.
_STORED = ("model", "expert_model")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(weight, dtype, rules: ShardingRules, logical_axes: LogicalAxes, whole: bool):
  return jax.reshard(weight.astype(dtype), rules.gathered(*logical_axes, whole=whole))


def _gather_forward(weight, dtype, rules, logical_axes, whole):
  return _gather(weight, dtype, rules, logical_axes, whole), None


def _gather_backward(dtype, rules, logical_axes, whole, _, gradient):
  spec, gathered = rules.spec(*logical_axes), rules.gathered(*logical_axes, whole=whole)
  if not gathered.reduced:
    return (jax.reshard(gradient.astype(jnp.float32), spec),)

  # The transpose of `reshard` would be an all-reduce in `dtype`, with twice the traffic.
  scattered = {name: getattr(rules, name) for name in _STORED if name in logical_axes}
  stored = {axis for axes in scattered.values() for axis in axes}
  if whole and "vocab" in logical_axes:
    scattered["vocab"] = rules.vocab
    stored.add(rules.vocab)
  summed = tuple(axis for axis in AXES if axis in gathered.reduced and axis not in stored)

  def reduce(gradient):
    gradient = gradient.astype(jnp.float32)
    for name, axes in scattered.items():
      gradient = jax.lax.psum_scatter(
        gradient, axes, scatter_dimension=logical_axes.index(name), tiled=True
      )
    return jax.lax.psum(gradient, summed)

  unreduced = PartitionSpec(*gathered.partitions, unreduced=gathered.reduced)
  return (jax.shard_map(reduce, in_specs=unreduced, out_specs=spec)(gradient),)


_gather.defvjp(_gather_forward, _gather_backward)


def require_explicit_mesh() -> None:
  """Raises a ValueError unless a mesh with explicit axes is set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Explicit for kind in mesh.axis_types):
    raise ValueError(
      "The model runs on a mesh, even of one device: call it under "
      "jax.set_mesh(lwm.parallel.mesh.make_mesh(...))."
    )
