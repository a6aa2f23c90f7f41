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


def residual_std(config: ModelConfig) -> float:
  """Standard deviation of the weights whose results are added to the residual stream.

  Each block adds two results, so the stream keeps its scale over the layers (GPT-2, section 2.3).
  """
  return config.initializer_std / (2 * config.num_layers) ** 0.5
