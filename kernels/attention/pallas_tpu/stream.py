"""A loop inside a TPU kernel over blocks that it copies from HBM into two buffers.

Each step of the kernel's grid visits its own list of blocks. While the kernel computes one block,
the copy of the next is always in flight, also across grid steps. Blocks outside the list cost
nothing: no grid step, no copy, no product.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


class Walk(Protocol):
  """The increasing block indices that each step visits. Indices are traced scalars."""

  def first(self, step: jax.Array) -> jax.Array:
    """The first block of a step, or at least `stop(step)` if it has none."""

  def following(self, step: jax.Array, index: jax.Array) -> jax.Array:
    """The block after `index`, or at least `stop(step)` if there is none."""

  def stop(self, step: jax.Array) -> jax.Array:
    """An index above every block of the step."""

  def is_full(self, step: jax.Array, index: jax.Array) -> jax.Array:
    """Whether the block needs no mask."""


def stream(
  walk: Walk,
  copies: Callable,
  compute: Callable[[jax.Array, jax.Array, bool], None],
  count_ref: jax.Ref,
) -> None:
  """Runs `compute(index, slot, is_masked)` for each block of this grid step.

  The steps are the grid's axis 1, which must be its last one, with semantics "arbitrary".

  Args:
    walk: which blocks each step visits.
    copies: `copies(index, slot)` returns the asynchronous copies of a block into buffer `slot`.
      They may depend on axis 0 of the grid, but not on the step.
    compute: called once per block, after its copies have arrived. Full blocks are not masked.
    count_ref: int32 [1] in SMEM, kept between steps: the number of blocks visited so far.
  """
  step, num_steps = pl.program_id(1), pl.num_programs(1)
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
    is_full = walk.is_full(step, index)
    pl.when(is_full)(lambda: compute(index, slot, False))
    pl.when(jnp.logical_not(is_full))(lambda: compute(index, slot, True))
    return following, count + 1

  count = count_ref[0]
  count_ref[0] = jax.lax.while_loop(lambda carry: carry[0] < stop, visit, (first, count))[1]

  @pl.when((first >= stop) & is_next_step)
  def _():
    start(next_step_first, count & 1)
