"""What a block reports in addition to its output: auxiliary losses and statistics.

L layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Extras(NamedTuple):
  """Named values of one block, of a scanned stretch of blocks, or of the whole decoder.

  Names must differ from those of the train step's own metrics (lwm/program/step.py), because the
  values join them. All values are global: a block that computes them inside `jax.shard_map` reduces
  them over the mesh axes that its tokens are divided over.

  Attributes:
    losses: float32 scalars per block, already weighted; the train step adds them to the loss. For
      the decoder: their sums over layers.
    statistics: arrays per block, of the same shape in all blocks that report the name. For the
      decoder: stacked over those blocks, [L, ...].
  """

  losses: dict[str, jax.Array]
  statistics: dict[str, jax.Array]


def nothing() -> Extras:
  """The extras of a block that reports nothing."""
  return Extras({}, {})


def of_decoder(stretches: Sequence[Extras]) -> Extras:
  """Joins the extras of consecutive stretches, all values stacked over the layers of a stretch."""
  losses: dict[str, jax.Array] = {}
  statistics: dict[str, list[jax.Array]] = {}
  for extras in stretches:
    for name, loss_L in extras.losses.items():
      losses[name] = losses.get(name, 0.0) + jnp.sum(loss_L)
    for name, statistic in extras.statistics.items():
      statistics.setdefault(name, []).append(statistic)
  return Extras(losses, {name: jnp.concatenate(parts) for name, parts in statistics.items()})
