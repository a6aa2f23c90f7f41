"""What the Triton kernels of attention share: which blocks to visit, bounds and scores.

Imports Triton, which only GPU installs have: `kernels.attention.triton` imports this when used.

D head_dim; q/k queries/keys of one block.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Below every score, and finite: the difference of two -inf is no number.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def meeting_blocks(start_q, stop_q, num_keys, KEY_BLOCK: tl.constexpr):
  """Ranges of key blocks, for the intervals of one block of queries; empty intervals do not count.

  Returns:
    (first, last, full_first, full_last): blocks [first, last) meet an interval; those of
    [full_first, full_last), within [first, last], lie inside all of them.
  """
  is_empty_q = stop_q <= start_q
  stop_key = tl.max(tl.where(is_empty_q, 0, stop_q), 0)
  last = (stop_key + KEY_BLOCK - 1) // KEY_BLOCK
  first = tl.minimum(tl.min(tl.where(is_empty_q, num_keys, start_q), 0) // KEY_BLOCK, last)
  full_first = (tl.max(tl.where(is_empty_q, 0, start_q), 0) + KEY_BLOCK - 1) // KEY_BLOCK
  full_last = tl.min(tl.where(is_empty_q, num_keys, stop_q), 0) // KEY_BLOCK
  return first, last, full_first, tl.maximum(tl.minimum(full_last, last), full_first)


@triton.jit
def block_at(index, first, last, full_first, full_last, IS_FULL: tl.constexpr):
  """The index-th full block; or else of [first, full_first) and then [full_last, last)."""
  if IS_FULL:
    return full_first + index
  else:
    return tl.where(first + index < full_first, first, full_last - full_first + first) + index


@triton.jit
def load_rows(pointers, is_row, IS_FULL: tl.constexpr):
  """Loads [rows, D]; zeros where `is_row` [rows] does not hold, which a full block does not ask."""
  if IS_FULL:
    return tl.load(pointers)
  else:
    return tl.load(pointers, mask=is_row[:, None], other=0.0)


@triton.jit
def base_2_scores(products, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
  """Scores in units of log2, and the derivative of the capped by the uncapped ones."""
  if SOFT_CAP is None:
    return products * (SCALE * LOG2_E), 1.0
  else:
    # tanh(x) = 1 - 2 / (1 + e^2x) is right at both ends, where e^2x is infinite or 0.
    tanh = 1.0 - 2.0 / (1.0 + tl.exp2(products * (2.0 * LOG2_E * SCALE / SOFT_CAP)))
    return tanh * (SOFT_CAP * LOG2_E), 1.0 - tanh * tanh


@triton.jit
def online_softmax(scores_qxk, maximum_q, sum_q):
  """Takes one more block of scores, in units of log2.

  Returns:
    (weights_qxk, decay_q, maximum_q, sum_q): weights relative to the new maximum, what earlier
    results are to be multiplied by, and the new maximum and sum of weights.
  """
  new_maximum_q = tl.maximum(maximum_q, tl.max(scores_qxk, 1))
  weights_qxk = tl.exp2(scores_qxk - new_maximum_q[:, None])
  decay_q = tl.exp2(maximum_q - new_maximum_q)
  return weights_qxk, decay_q, new_maximum_q, sum_q * decay_q + tl.sum(weights_qxk, 1)
