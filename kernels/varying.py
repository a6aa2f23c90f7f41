"""Tracks which mesh axes an array varies over inside `jax.shard_map` (JAX's varying axes)."""

from collections.abc import Sequence
from typing import Any, cast

import jax


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Makes all arrays vary over every mesh axis that any of them varies over.

  Outside `jax.shard_map` it changes nothing. Its transpose sums the cotangent over the added axes:
  where devices shared a value, the gradient is the sum over those devices.
  """
  axes = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))

  def vary(array: jax.Array) -> jax.Array:
    kinds = jax.typeof(array).manual_axis_type
    added = axes - kinds.varying
    # `pcast` takes axes of one kind at a time.
    for group in (added & kinds.reduced, added - kinds.reduced):
      if group:
        array = jax.lax.pcast(array, tuple(group), to="varying")
    return array

  return tuple(vary(array) for array in arrays)


def vary_trees_alike(*trees: Any) -> tuple[Any, ...]:
  """`vary_alike` for all arrays of trees."""
  leaves, structure = jax.tree.flatten(trees)
  return jax.tree.unflatten(structure, vary_alike(*leaves))


def vary_as[T: tuple](arguments: Sequence[jax.Array], results: T) -> T:
  """Makes the results of a kernel vary over its arguments' mesh axes, where JAX does not know."""
  return cast(T, vary_alike(*arguments, *results)[len(arguments) :])
