"""Flags of programs whose work several processes share."""

from absl import flags

from lwm.errors import UserError


class Shards:
  """The flags --num_shards and --shard_index, which this object defines."""

  def __init__(self):
    self._count = flags.DEFINE_integer(
      "num_shards", None, "Number of workers that share the work.", lower_bound=1
    )
    self._index = flags.DEFINE_integer(
      "shard_index", None, "Number of this worker, from 0.", lower_bound=0
    )

  def is_share(self) -> bool:
    """Whether this process makes only a share of the work.

    Raises:
      UserError: the flags contradict each other.
    """
    count, index = self._count.value, self._index.value
    if (count is None) != (index is None):
      raise UserError("Give both --num_shards and --shard_index, or neither.")
    if count is not None and index is not None and index >= count:
      raise UserError(f"--shard_index={index} is not below --num_shards={count}.")
    return count is not None

  def is_mine(self, number: int) -> bool:
    """Whether this process makes the part of a number."""
    return number % (self._count.value or 1) == (self._index.value or 0)

  def print_complete(self) -> None:
    """Says that this process has made its share."""
    print(f"shard {self._index.value} of {self._count.value}: complete", flush=True)
