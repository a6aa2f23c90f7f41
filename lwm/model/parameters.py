"""How parameters are declared, and the norm.

L layers of a stretch, W the normalised width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lwm.config.model import ModelConfig
from lwm.parallel.sharding import LogicalAxes, ShardingRules


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation (arXiv 1910.07467), computed in float32."""

  def __init__(self, config: ModelConfig, stack: tuple[int, ...], width: int | None = None):
    """Declares scales [W], or [L, W] if `stack` is (L,); default width: that of the model."""
    self.epsilon = config.norm_epsilon
    axes = ("layers",) * len(stack) + (None,)
    self.scale = nnx.Param(jnp.ones((*stack, width or config.width)), logical_axes=axes)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises along the last axis, [..., W]."""
    x, dtype = x.astype(jnp.float32), x.dtype
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    normal = x * jax.lax.rsqrt(mean_square + self.epsilon)
    return (normal * jnp.expand_dims(self.scale[...], range(x.ndim - 1))).astype(dtype)


def matrix(
  rngs: nnx.Rngs,
  rules: ShardingRules,
  shape: tuple[int, ...],
  logical_axes: LogicalAxes,
  standard_deviation: float,
) -> nnx.Param:
  """A float32 parameter from a normal distribution; each device draws only its own shard.

  Args:
    rngs: its `params` stream gives one key per parameter, in the order of declaration.
    rules: which mesh axes carry the dimensions.
    shape: of the parameter, with the leading axis of layers if it has one.
    logical_axes: the name of each dimension, a field of `rules`.
    standard_deviation: of the distribution.
  """
  mesh = jax.sharding.get_abstract_mesh()
  spec = None if mesh.empty else rules.spec(*logical_axes)
  value = jax.random.normal(rngs.params(), shape, out_sharding=spec)
  return nnx.Param(standard_deviation * value, logical_axes=logical_axes)


def zeros(rules: ShardingRules, shape: tuple[int, ...], logical_axes: LogicalAxes) -> nnx.Param:
  """A float32 parameter that is zero at first; the arguments are those of `matrix`."""
  mesh = jax.sharding.get_abstract_mesh()
  spec = None if mesh.empty else rules.spec(*logical_axes)
  return nnx.Param(jnp.zeros(shape, jnp.float32, out_sharding=spec), logical_axes=logical_axes)


def table(
  rngs: nnx.Rngs,
  rules: ShardingRules,
  shape: tuple[int, ...],
  logical_axes: LogicalAxes,
  config: ModelConfig,
) -> nnx.Param:
  """A `matrix` with one row or column per id; those of padding are zero.

  The numbers do not depend on the padding, and so not on the mesh.
  """
  std, ids = config.initializer_std, config.vocab_size
  axis = logical_axes.index("vocab")
  padding = shape[axis] - ids
  if not padding:
    return matrix(rngs, rules, shape, logical_axes, std)
  # The ids alone may not divide over the mesh.
  whole = tuple(None if name == "vocab" else name for name in logical_axes)
  drawn = matrix(rngs, rules, (*shape[:axis], ids, *shape[axis + 1 :]), whole, std)[...]
  value = jnp.pad(drawn, [(0, padding * (name == "vocab")) for name in logical_axes])
  if not jax.sharding.get_abstract_mesh().empty:
    value = jax.reshard(value, rules.spec(*logical_axes))
  return nnx.Param(value, logical_axes=logical_axes)


def residual_std(config: ModelConfig) -> float:
  """Standard deviation of the weights whose results are added to the residual stream.

  Each block adds two results, so the stream keeps its scale over the layers (GPT-2, section 2.3).
  """
  return config.initializer_std / (2 * config.num_layers) ** 0.5
