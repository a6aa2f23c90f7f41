"""Which mesh axis carries which dimension. The only place that knows.

Parameters and activations name their dimensions by logical axes ("model", "heads", "sequence", ...);
`ShardingRules` maps those to mesh axes. All mesh axes are explicit: JAX keeps the sharding in the
type of every array and refuses to guess.
"""

import dataclasses

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

LogicalAxes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """Mesh axes of each logical axis; None is replicated.

  `model` is the width of the model in a parameter, stored in shards and gathered for use; the width
  of an activation has no name: it is never sharded.
  """

  layers: None = None
  model: str | None = "fsdp"
  heads: str | None = "tensor"
  kv_heads: str | None = "tensor"
  head_dim: None = None
  feed_forward: str | None = "tensor"
  vocab: str | None = "tensor"
  batch: tuple[str, ...] = ("data", "fsdp")
  sequence: str = "ring"

  def spec(self, *logical_axes: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions are these."""
    return PartitionSpec(*(axis and getattr(self, axis) for axis in logical_axes))

  def gather(self, weight: jax.Array, dtype: str, *logical_axes: str | None) -> jax.Array:
    """A parameter ready for use: cast, then whole along `model`, still sharded over `tensor`.

    Said in the program, since XLA might otherwise gather the activations instead.
    """
    spec = self.spec(*(None if axis == "model" else axis for axis in logical_axes))
    return jax.reshard(weight.astype(dtype), spec)

  def tree_specs(self, logical_axes):
    """PartitionSpecs of a tree whose leaves are tuples of logical axes."""
    return jax.tree.map(lambda axes: self.spec(*axes), logical_axes, is_leaf=_is_axes)

  def tree_shardings(self, logical_axes, mesh: Mesh):
    """NamedShardings of a tree whose leaves are tuples of logical axes."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, self.spec(*axes)), logical_axes, is_leaf=_is_axes
    )


def require_explicit_mesh() -> None:
  """Raises a ValueError unless a mesh with explicit axes is set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Explicit for kind in mesh.axis_types):
    raise ValueError(
        "The model runs on a mesh, even of one device: call it under "
        "jax.set_mesh(lwm.parallel.mesh.make_mesh(...))."
    )


def _is_axes(value) -> bool:
  return isinstance(value, tuple)
