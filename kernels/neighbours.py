"""Inside `jax.shard_map`: tokens exchanged with the neighbours along a mesh axis.

B batch, S sequence: the local part, of n neighbours.
"""

import jax


def gather_tokens(x_BxSxM: jax.Array, axis_name: str) -> jax.Array:
  """The tokens of all neighbours, [B, n S, M]; its transpose is `scatter_tokens`."""
  if jax.lax.axis_size(axis_name) == 1:
    return x_BxSxM
  return jax.lax.all_gather(x_BxSxM, axis_name, axis=1, tiled=True)


def scatter_tokens(x_BxSxM: jax.Array, axis_name: str) -> jax.Array:
  """Sums over the neighbours; each keeps its own tokens, [B, S / n, M]."""
  if jax.lax.axis_size(axis_name) == 1:
    return x_BxSxM
  return jax.lax.psum_scatter(x_BxSxM, axis_name, scatter_dimension=1, tiled=True)
