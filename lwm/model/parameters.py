"""How parameters are declared, and the norm.

B batch, S sequence, M model width, L layers of a stretch.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lwm.config.model import ModelConfig
from lwm.parallel.sharding import LogicalAxes, ShardingRules


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation (arXiv 1910.07467), computed in float32."""

  def __init__(self, config: ModelConfig, stack: tuple[int, ...]):
    """Declares scales [M], or [L, M] if `stack` is (L,)."""
    self.epsilon = config.norm_epsilon
    axes = ("layers",) * len(stack) + (None,)
    self.scale = nnx.Param(jnp.ones((*stack, config.width)), logical_axes=axes)

  def __call__(self, x_BxSxM: jax.Array) -> jax.Array:
    x_BxSxM, dtype = x_BxSxM.astype(jnp.float32), x_BxSxM.dtype
    mean_square_BxSx1 = jnp.mean(jnp.square(x_BxSxM), axis=-1, keepdims=True)
    normal_BxSxM = x_BxSxM * jax.lax.rsqrt(mean_square_BxSx1 + self.epsilon)
    return (normal_BxSxM * self.scale[...][None, None]).astype(dtype)


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
