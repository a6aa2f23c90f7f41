"""Variables of NNX modules as nested dicts of arrays, and back."""

from typing import Any

from flax import nnx, traverse_util

Params = dict[str, Any]


def plain(state: nnx.State) -> Params:
  """A module's variables as nested dicts with names as keys."""
  return traverse_util.unflatten_dict(
    {tuple(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}
  )


def with_values(state: nnx.State, params: Params) -> nnx.State:
  """The inverse of `plain`, given a state of the same structure."""
  leaves = traverse_util.flatten_dict(params)
  return nnx.from_flat_state(
    [
      (path, variable.replace(leaves[tuple(map(str, path))]))
      for path, variable in nnx.to_flat_state(state)
    ]
  )
