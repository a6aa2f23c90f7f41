"""What the Triton kernels of attention and decode share: ranges of blocks, loads and scores.

Only GPU installs have Triton, so the backends import this file and the kernels when they are used.

D head_dim, q/k queries/keys per block.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Below every score, and finite because -inf - -inf is NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def meeting_blocks(
  start_q: tl.tensor, stop_q: tl.tensor, num_keys: tl.tensor, KEY_BLOCK: tl.constexpr
) -> tuple:
  """`kernels.attention.block_tables.of_queries` for one block of queries, inside a kernel.

  Returns:
    (first, stop, full_first, full_stop): all key blocks that meet an interval are in [first, stop),
    and [full_first, full_stop) are inside all intervals that are not empty.
  """
  is_empty_q = stop_q <= start_q
  stop_key = tl.max(tl.where(is_empty_q, 0, stop_q), 0)
  stop = (stop_key + KEY_BLOCK - 1) // KEY_BLOCK
  first = tl.minimum(tl.min(tl.where(is_empty_q, num_keys, start_q), 0) // KEY_BLOCK, stop)
  full_first = (tl.max(tl.where(is_empty_q, 0, start_q), 0) + KEY_BLOCK - 1) // KEY_BLOCK
  full_stop = tl.min(tl.where(is_empty_q, num_keys, stop_q), 0) // KEY_BLOCK
  return first, stop, full_first, tl.maximum(tl.minimum(full_stop, stop), full_first)


@triton.jit
def block_at(
  index: tl.tensor,
  first: tl.tensor,
  full_first: tl.tensor,
  full_stop: tl.tensor,
  IS_FULL: tl.constexpr,
) -> tl.tensor:
  """The index-th full block, or the index-th block from `first` on that is not full."""
  if IS_FULL:
    return full_first + index
  else:
    return tl.where(first + index < full_first, first, full_stop - full_first + first) + index


@triton.jit
def load_rows(pointers: tl.tensor, is_row: tl.tensor, IS_FULL: tl.constexpr) -> tl.tensor:
  """Loads [rows, D]. Full blocks ignore `is_row` [rows]; others load zeros where it is false."""
  if IS_FULL:
    return tl.load(pointers)
  else:
    return tl.load(pointers, mask=is_row[:, None], other=0.0)


@triton.jit
def base_2_scores(products: tl.tensor, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr) -> tuple:
  """Scores in units of log 2, and the derivative of the soft cap (1 without one)."""
  if SOFT_CAP is None:
    return products * (SCALE * LOG2_E), 1.0
  else:
    # tanh(x) = 1 - 2 / (1 + e^2x) is also correct where e^2x is infinite or 0.
    tanh = 1.0 - 2.0 / (1.0 + tl.exp2(products * (2.0 * LOG2_E * SCALE / SOFT_CAP)))
    return tanh * (SOFT_CAP * LOG2_E), 1.0 - tanh * tanh


@triton.jit
def online_softmax(scores_qxk: tl.tensor, maximum_q: tl.tensor, sum_q: tl.tensor) -> tuple:
  """Adds one more block of scores, in units of log 2.

  Returns:
    (weights_qxk, decay_q, maximum_q, sum_q): weights relative to the new maximum, the factor for
    earlier results, and the new maximum and sum of weights.
  """
  new_maximum_q = tl.maximum(maximum_q, tl.max(scores_qxk, 1))
  weights_qxk = tl.exp2(scores_qxk - new_maximum_q[:, None])
  decay_q = tl.exp2(maximum_q - new_maximum_q)
  return weights_qxk, decay_q, new_maximum_q, sum_q * decay_q + tl.sum(weights_qxk, 1)
