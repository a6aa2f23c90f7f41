"""Exchanges tokens between the devices of a mesh axis, inside `jax.shard_map`.

B batch, S local sequence length, M model width, n devices of the axis.
"""

import jax


def gather_tokens(x_BxSxM: jax.Array, axis_name: str) -> jax.Array:
  """Concatenates the tokens of all devices, [B, n S, M]; its transpose is `scatter_tokens`."""
  if jax.lax.axis_size(axis_name) == 1:
    return x_BxSxM
  return jax.lax.all_gather(x_BxSxM, axis_name, axis=1, tiled=True)


def scatter_tokens(x_BxSxM: jax.Array, axis_name: str) -> jax.Array:
  """Sums over the devices; each keeps its own share of the tokens, [B, S / n, M]."""
  if jax.lax.axis_size(axis_name) == 1:
    return x_BxSxM
  return jax.lax.psum_scatter(x_BxSxM, axis_name, scatter_dimension=1, tiled=True)
