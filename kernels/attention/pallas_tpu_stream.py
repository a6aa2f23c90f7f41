"""A loop inside a TPU kernel over blocks that it copies from HBM, two buffers deep.

Each step of the kernel's grid visits its own list of blocks. The copy of the next block is always
in flight while one is computed, also from the last block of a step to the first of the following,
and blocks outside the list cost nothing: no grid step, no copy, no product.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


class Walk(Protocol):
  """The increasing list of block indices that each step visits; indices are traced scalars."""

  def first(self, step: jax.Array) -> jax.Array:
    """The first block of a step, or `stop(step)` if it has none."""

  def following(self, step: jax.Array, index: jax.Array) -> jax.Array:
    """The block after `index`, or anything from `stop(step)` on."""

  def stop(self, step: jax.Array) -> jax.Array:
    """Above every block of the step."""


def stream(
  walk: Walk,
  copies: Callable,
  compute: Callable[[jax.Array, jax.Array], None],
  count_ref,
  *,
  axis: int,
) -> None:
  """Runs `compute(index, slot)` for each block of this grid step, its copies having arrived.

  Args:
    walk: which blocks each step visits.
    copies: `copies(index, slot)` are the asynchronous copies of a block into buffer `slot`. They
      depend on the grid's other axes, but not on the step.
    count_ref: int32 [1] in SMEM, kept between steps: blocks visited so far.
    axis: the grid axis of the steps; it is the last one, and "arbitrary".
  """
  step, num_steps = pl.program_id(axis), pl.num_programs(axis)
  stop = walk.stop(step)
  next_step = jnp.minimum(step + 1, num_steps - 1)
  next_step_first = walk.first(next_step)
  is_next_step = (step + 1 < num_steps) & (next_step_first < walk.stop(next_step))
  first = walk.first(step)

  def start(index, slot):
    for copy in copies(index, slot):
      copy.start()

  @pl.when(step == 0)
  def _():
    count_ref[0] = 0

    @pl.when(first < stop)
    def _():
      start(first, 0)

  def visit(carry):
    index, count = carry
    slot = count & 1
    following = walk.following(step, index)
    is_last = following >= stop

    @pl.when(jnp.logical_not(is_last) | is_next_step)
    def _():
      start(jnp.where(is_last, next_step_first, following), 1 - slot)

    for copy in copies(index, slot):
      copy.wait()
    compute(index, slot)
    return following, count + 1

  count = count_ref[0]
  _, count_ref[0] = jax.lax.while_loop(lambda carry: carry[0] < stop, visit, (first, count))

  @pl.when((first >= stop) & is_next_step)
  def _():
    start(next_step_first, count & 1)
