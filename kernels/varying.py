"""Tracks which mesh axes an array varies over inside `jax.shard_map` (JAX's varying axes)."""

from collections.abc import Sequence
from typing import Any, cast

import jax


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Makes all arrays vary over every mesh axis that any of them varies over.

  Outside `jax.shard_map` it changes nothing. Its transpose sums the cotangent over the added axes:
  where devices shared a value, the gradient is the sum over those devices.
  """
  varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
  axes = frozenset().union(*varying)
  return tuple(
    jax.lax.pcast(array, tuple(axes - own), to="varying") for array, own in zip(arrays, varying)
  )


def vary_trees_alike(*trees: Any) -> tuple[Any, ...]:
  """`vary_alike` for all arrays of trees."""
  leaves, structure = jax.tree.flatten(trees)
  return jax.tree.unflatten(structure, vary_alike(*leaves))


def vary_as[T: tuple](arguments: Sequence[jax.Array], results: T) -> T:
  """Makes the results of a kernel vary over its arguments' mesh axes, where JAX does not know."""
  return cast(T, vary_alike(*arguments, *results)[len(arguments) :])
