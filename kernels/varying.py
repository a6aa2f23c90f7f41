"""Inside `jax.shard_map`: which mesh axes an array varies over (JAX's varying manual axes)."""

import jax


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Inside `shard_map`, makes all arrays vary over the mesh axes that any of them varies over.

  Outside it changes nothing. The transpose sums the cotangent over the axes added: where devices
  shared a value, its gradient is the sum over them.
  """
  varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
  axes = frozenset().union(*varying)
  return tuple(
    jax.lax.pcast(array, tuple(axes - own), to="varying") for array, own in zip(arrays, varying)
  )
