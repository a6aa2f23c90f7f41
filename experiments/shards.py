"""Flags of programs whose work several processes share."""

from absl import flags

from lwm.errors import UserError

_NUM_SHARDS = flags.DEFINE_integer(
  "num_shards", None, "Number of workers that share the work.", lower_bound=1
)
_SHARD_INDEX = flags.DEFINE_integer(
  "shard_index", None, "Number of this worker, from 0.", lower_bound=0
)


def is_shard() -> bool:
  """Whether this process makes only a share of the work.

  Raises:
    UserError: the flags contradict each other.
  """
  count, index = _NUM_SHARDS.value, _SHARD_INDEX.value
  if (count is None) != (index is None):
    raise UserError("Give both --num_shards and --shard_index, or neither.")
  if count is not None and index is not None and index >= count:
    raise UserError(f"--shard_index={index} is not below --num_shards={count}.")
  return count is not None


def is_mine(number: int) -> bool:
  """Whether this process makes the part of a number."""
  return number % (_NUM_SHARDS.value or 1) == (_SHARD_INDEX.value or 0)


def print_complete() -> None:
  """Says that this process has made its share."""
  print(f"shard {_SHARD_INDEX.value} of {_NUM_SHARDS.value}: complete", flush=True)
