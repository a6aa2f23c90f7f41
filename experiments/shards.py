"""Flags of programs whose work several processes share."""

import dataclasses

from absl import flags

from lwm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Share:
  """The parts of a dataset that one of `count` workers makes."""

  count: int
  index: int

  def is_mine(self, number: int) -> bool:
    """Whether this worker makes the part of a number."""
    return number % self.count == self.index

  def print_complete(self) -> None:
    """Says that this worker has made its share."""
    print(f"shard {self.index} of {self.count}: complete", flush=True)


ALL = Share(1, 0)


class Shards:
  """The flags --num_shards and --shard_index, which this object defines."""

  def __init__(self):
    self._count = flags.DEFINE_integer(
      "num_shards", None, "Number of workers that share the work.", lower_bound=1
    )
    self._index = flags.DEFINE_integer(
      "shard_index", None, "Number of this worker, from 0.", lower_bound=0
    )

  def share(self) -> Share | None:
    """What this process makes, or None if it makes the dataset.

    Raises:
      UserError: the flags contradict each other.
    """
    count, index = self._count.value, self._index.value
    if (count is None) != (index is None):
      raise UserError("Give both --num_shards and --shard_index, or neither.")
    if count is None or index is None:
      return None
    if index >= count:
      raise UserError(f"--shard_index={index} is not below --num_shards={count}.")
    return Share(count, index)
