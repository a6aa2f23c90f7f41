"""Adam's moments in fewer bytes: bfloat16, or eight bits and a scale per row.

The eight-bit format follows 8-bit optimizers (arXiv 2110.02861): a number is a code times the
largest magnitude among its neighbours, here those along the last axis. First moments have linear
codes. Second moments have codes of their logarithm, because linear codes would round small ones to
0 and make their updates unbounded. Second moments are rounded up or down at random, in proportion:
most steps move them by less than one code, and rounding to nearest would never change them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Codes of second moments per factor of two; 255 codes reach down to 2^-32 of the row's largest.
_CODES_PER_OCTAVE = 8
_TOP_CODE = 255


class Coded(NamedTuple):
  """A moment of a parameter.

  Attributes:
    code: int8 (first moments) or uint8 (second), in the parameter's shape.
    scale: float32, the largest magnitude along the last axis, [..., 1].
  """

  code: jax.Array
  scale: jax.Array


def scale_by_adam(
  beta1: float, beta2: float, epsilon: float, dtype: str
) -> optax.GradientTransformation:
  """`optax.scale_by_adam` with moments in `dtype`, one of `experiment.MOMENT_DTYPES`.

  They are computed in float32 and rounded once per step.
  """
  adam = optax.scale_by_adam(beta1, beta2, epsilon)
  if dtype == "float32":
    return adam

  def init(params: Any) -> optax.ScaleByAdamState:
    return _encode(adam.init(params), dtype)

  def update(gradients, state, params=None):
    updates, state = adam.update(gradients, _decode(state), params)
    return updates, _encode(state, dtype)

  return optax.GradientTransformation(init, update)


def _encode(state: optax.ScaleByAdamState, dtype: str) -> optax.ScaleByAdamState:
  if dtype == "bfloat16":
    mu, nu = jax.tree.map(lambda moment: moment.astype(jnp.bfloat16), (state.mu, state.nu))
    return state._replace(mu=mu, nu=nu)
  # The same numbers on any mesh, and after a resume.
  key = jax.random.fold_in(jax.random.key(0), state.count)
  leaves, structure = jax.tree.flatten(state.nu)
  nu = [encode_second(leaf, jax.random.fold_in(key, n)) for n, leaf in enumerate(leaves)]
  return state._replace(
    mu=jax.tree.map(encode_first, state.mu), nu=jax.tree.unflatten(structure, nu)
  )


def _decode(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
  def decode(moment, decode_coded):
    return decode_coded(moment) if isinstance(moment, Coded) else moment.astype(jnp.float32)

  def tree(moments, decode_coded):
    is_leaf = lambda node: isinstance(node, Coded)
    return jax.tree.map(lambda moment: decode(moment, decode_coded), moments, is_leaf=is_leaf)

  return state._replace(mu=tree(state.mu, decode_first), nu=tree(state.nu, decode_second))


def encode_first(moment: jax.Array) -> Coded:
  """A float32 array in int8 codes; errors are at most 1/254 of the largest element of the row."""
  scale = jnp.max(jnp.abs(moment), axis=-1, keepdims=True)
  code = jnp.round(moment * (127 / jnp.where(scale > 0, scale, 1)))
  return Coded(code.astype(jnp.int8), scale)


def decode_first(coded: Coded) -> jax.Array:
  """The float32 array of first moments that the codes stand for."""
  return coded.code.astype(jnp.float32) * (coded.scale / 127)


def encode_second(moment: jax.Array, key: jax.Array) -> Coded:
  """A float32 array >= 0 in codes of its logarithm; the error is less than a factor of 2^(1/8).

  Elements below 2^-31.9 of their row's largest are raised to that.
  """
  scale = jnp.max(moment, axis=-1, keepdims=True)
  octaves = jnp.log2(moment / jnp.where(scale > 0, scale, 1))
  dither = jax.random.uniform(key, moment.shape, out_sharding=jax.typeof(moment).sharding)
  code = jnp.floor(_TOP_CODE + _CODES_PER_OCTAVE * octaves + dither)
  return Coded(jnp.clip(code, 0, _TOP_CODE).astype(jnp.uint8), scale)


def decode_second(coded: Coded) -> jax.Array:
  """The float32 array of second moments that the codes stand for."""
  octaves = (coded.code.astype(jnp.float32) - _TOP_CODE) / _CODES_PER_OCTAVE
  return coded.scale * jnp.exp2(octaves)
