"""Linear cross-entropy in blocks of tokens and vocabulary, in plain JAX, with its own backward.

Tokens are visited in the order of their target's range; tokens without a target are skipped. So a
chunk of tokens pays for the columns of one range, and the work is proportional to the number of
tokens with a loss. Only [chunk, block] logits exist at a time; the backward pass recomputes them.
The loops contain no collectives, so that devices may run different numbers of iterations.

N tokens, M model width, V vocabulary (the local columns of a sharded head), C tokens per chunk,
W columns per block, P = N + C.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.cross_entropy.reference import Ranges

# The width of a block is a multiple of this, the lanes of a TPU register.
_LANES = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def statistics(
  hidden_NxM: jax.Array,
  head_MxV: jax.Array,
  targets_N: jax.Array,
  first_column: jax.Array,
  ranges: Ranges,
  chunk: int,
  vocab_block: int,
) -> tuple[jax.Array, jax.Array]:
  """The log-sum-exp over the local columns of each target's range, and the target's logit.

  Inside `jax.shard_map`, all arrays must vary over the same axes. Arguments that are not listed are
  those of `linear_cross_entropy`.

  Args:
    head_MxV: the columns [first_column, first_column + V) of the whole head.
    targets_N: int32 ids of the whole vocabulary.
    first_column: int32 scalar.
    ranges: disjoint ranges [start, stop) of the whole vocabulary.

  Returns:
    Two float32 arrays [N], both differentiable. The log-sum-exp is -inf if no local column is in
    the target's range. The logit is 0 if the target is not a local column. Both are 0 if the target
    is outside all ranges.
  """
  return _forward(hidden_NxM, head_MxV, targets_N, first_column, ranges, chunk, vocab_block)[0]


def _forward(hidden_NxM, head_MxV, targets_N, first_column, ranges, chunk, vocab_block):
  compute_head_MxV = head_MxV.astype(hidden_NxM.dtype)
  vary = _vary_like(hidden_NxM)

  def visit(tokens, blocks, carry):
    hidden_CxM = tokens.take(hidden_NxM)
    targets_C = tokens.take(targets_N) - first_column

    def add_block(number, carry):
      maximum_C, total_C, target_logit_C = carry
      block = blocks.block(number)
      logits_CxW = block.logits(hidden_CxM, compute_head_MxV)
      new_maximum_C = jnp.maximum(maximum_C, logits_CxW.max(axis=1))
      total_C *= jnp.exp(maximum_C - new_maximum_C)
      total_C += jnp.exp(logits_CxW - new_maximum_C[:, None]).sum(axis=1)
      found_C = (targets_C >= block.lower) & (targets_C < block.upper)
      column_C = jnp.where(found_C, targets_C - block.begin, 0)
      logit_C = jnp.take_along_axis(logits_CxW, column_C[:, None], axis=1)[:, 0]
      return new_maximum_C, total_C, jnp.where(found_C, logit_C, target_logit_C)

    zero_C = jnp.zeros(chunk, jnp.float32)
    # Finite, because -inf - -inf is NaN.
    lowest_C = jnp.full(chunk, jnp.finfo(jnp.float32).min)
    maximum_C, total_C, target_logit_C = jax.lax.fori_loop(
      0, blocks.count, add_block, vary((lowest_C, zero_C, zero_C))
    )
    log_sum_exp_P, target_logit_P = carry
    return (
      tokens.put(log_sum_exp_P, maximum_C + jnp.log(total_C)),
      tokens.put(target_logit_P, target_logit_C),
    )

  order = _Order(targets_N, ranges, chunk)
  zero_P = jnp.zeros(order.padded_size, jnp.float32)
  log_sum_exp_P, target_logit_P = _visit_chunks(
    visit, vary((zero_P, zero_P)), order, head_MxV.shape[1], first_column, vocab_block
  )
  log_sum_exp_N = order.restore(log_sum_exp_P)
  residuals = hidden_NxM, head_MxV, targets_N, first_column, log_sum_exp_N
  return (log_sum_exp_N, order.restore(target_logit_P)), residuals


def _backward(ranges, chunk, vocab_block, residuals, cotangents):
  hidden_NxM, head_MxV, targets_N, first_column, log_sum_exp_N = residuals
  log_sum_exp_cotangent_N, target_logit_cotangent_N = cotangents
  compute_head_MxV = head_MxV.astype(hidden_NxM.dtype)
  vary = _vary_like(hidden_NxM)

  def visit(tokens, blocks, carry):
    # Rows outside this chunk may hold NaN, which 0 weights do not remove. exp(0 - inf) is 0.
    hidden_CxM = jnp.where(tokens.valid_C[:, None], tokens.take(hidden_NxM), 0)
    targets_C = tokens.take(targets_N) - first_column
    log_sum_exp_C = jnp.where(tokens.valid_C, tokens.take(log_sum_exp_N), jnp.inf)
    softmax_cotangent_C = tokens.take(log_sum_exp_cotangent_N)
    one_hot_cotangent_C = jnp.where(tokens.valid_C, tokens.take(target_logit_cotangent_N), 0.0)

    def add_block(number, carry):
      hidden_gradient_CxM, head_gradient_MxV = carry
      block = blocks.block(number)
      logits_CxW = block.logits(hidden_CxM, compute_head_MxV)
      column_1xW = block.begin + jnp.arange(blocks.width)[None]
      # Columns outside the block have logit -inf, so their gradient is 0.
      gradient_CxW = jnp.exp(logits_CxW - log_sum_exp_C[:, None]) * softmax_cotangent_C[:, None]
      is_target_CxW = (column_1xW == targets_C[:, None]) & (column_1xW >= block.lower)
      gradient_CxW += jnp.where(is_target_CxW, one_hot_cotangent_C[:, None], 0.0)
      gradient_CxW = gradient_CxW.astype(hidden_CxM.dtype)
      hidden_gradient_CxM += jnp.einsum(
        "cw,mw->cm", gradient_CxW, block.slice(compute_head_MxV), preferred_element_type=jnp.float32
      )
      head_gradient_MxW = jnp.einsum(
        "cm,cw->mw", hidden_CxM, gradient_CxW, preferred_element_type=jnp.float32
      )
      head_gradient_MxV = jax.lax.dynamic_update_slice_in_dim(
        head_gradient_MxV, block.slice(head_gradient_MxV) + head_gradient_MxW, block.begin, axis=1
      )
      return hidden_gradient_CxM, head_gradient_MxV

    hidden_gradient_PxM, head_gradient_MxV = carry
    zero_CxM = vary(jnp.zeros(hidden_CxM.shape, jnp.float32))
    hidden_gradient_CxM, head_gradient_MxV = jax.lax.fori_loop(
      0, blocks.count, add_block, (zero_CxM, head_gradient_MxV)
    )
    return tokens.put(hidden_gradient_PxM, hidden_gradient_CxM), head_gradient_MxV

  # Tokens whose loss has weight 0 are skipped.
  counts_N = (log_sum_exp_cotangent_N != 0) | (target_logit_cotangent_N != 0)
  order = _Order(jnp.where(counts_N, targets_N, -1), ranges, chunk)
  zero_PxM = jnp.zeros((order.padded_size, hidden_NxM.shape[1]), hidden_NxM.dtype)
  zero_MxV = jnp.zeros(head_MxV.shape, jnp.float32)
  hidden_gradient_PxM, head_gradient_MxV = _visit_chunks(
    visit, vary((zero_PxM, zero_MxV)), order, head_MxV.shape[1], first_column, vocab_block
  )
  return order.restore(hidden_gradient_PxM), head_gradient_MxV.astype(head_MxV.dtype), None, None


statistics.defvjp(_forward, _backward)


class _Order:
  """Tokens sorted by their target's range; range r fills the slots [starts[r], starts[r + 1])."""

  def __init__(self, targets_N: jax.Array, ranges: Ranges, chunk: int):
    range_N = jnp.full(targets_N.shape, len(ranges), jnp.int32)
    for number, (start, stop) in enumerate(ranges):
      range_N = jnp.where((targets_N >= start) & (targets_N < stop), number, range_N)
    order_N = jnp.argsort(range_N)
    self.ranges = ranges
    self.chunk = chunk
    self.padded_size = targets_N.shape[0] + chunk
    self.starts = [(range_N < number).sum() for number in range(len(ranges) + 1)]
    self._order_P = jnp.pad(order_N, (0, chunk))
    self._inverse_N = jnp.argsort(order_N)

  def tokens(self, number: int, chunk_number: jax.Array) -> "_Tokens":
    """The chunk `chunk_number` of the range `number`."""
    slot = self.starts[number] + chunk_number * self.chunk
    index_C = jax.lax.dynamic_slice_in_dim(self._order_P, slot, self.chunk)
    return _Tokens(slot, index_C, slot + jnp.arange(self.chunk) < self.starts[number + 1])

  def restore(self, sorted_P: jax.Array) -> jax.Array:
    return sorted_P[self._inverse_N]


class _Tokens(NamedTuple):
  """A chunk of sorted tokens: its first slot, their indices, and which of them are in its range."""

  slot: jax.Array
  index_C: jax.Array
  valid_C: jax.Array

  def take(self, values_Nx: jax.Array) -> jax.Array:
    return values_Nx.at[self.index_C].get(mode="promise_in_bounds")

  def put(self, sorted_Px: jax.Array, values_Cx: jax.Array) -> jax.Array:
    """Writes the chunk's rows, and zeros after its range ends, where a later chunk may write."""
    valid_Cx = self.valid_C.reshape((-1,) + (1,) * (values_Cx.ndim - 1))
    values_Cx = jnp.where(valid_Cx, values_Cx, 0).astype(sorted_Px.dtype)
    return jax.lax.dynamic_update_slice_in_dim(sorted_Px, values_Cx, self.slot, axis=0)


class _Block(NamedTuple):
  """Columns [lower, upper) within the `width` columns from `begin`."""

  begin: jax.Array
  lower: jax.Array
  upper: jax.Array
  width: int

  def slice(self, head_MxV: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(head_MxV, self.begin, self.width, axis=1)

  def logits(self, hidden_CxM: jax.Array, head_MxV: jax.Array) -> jax.Array:
    """Float32 logits, -inf outside the block."""
    logits_CxW = jnp.dot(hidden_CxM, self.slice(head_MxV), preferred_element_type=jnp.float32)
    column_1xW = self.begin + jnp.arange(self.width)[None]
    inside_1xW = (column_1xW >= self.lower) & (column_1xW < self.upper)
    return jnp.where(inside_1xW, logits_CxW, -jnp.inf)


class _Blocks:
  """The blocks of local columns that cover a range of the vocabulary."""

  def __init__(self, start, stop, num_columns: int, first_column: jax.Array, vocab_block: int):
    length = min(stop - start, num_columns)
    even_width = -(-length // -(-length // vocab_block))
    self.width = min(-(-even_width // _LANES) * _LANES, num_columns)
    self._num_columns = num_columns
    self._start = jnp.clip(start - first_column, 0, num_columns)
    self._stop = jnp.clip(stop - first_column, 0, num_columns)
    self.count = -(-(self._stop - self._start) // self.width)

  def block(self, number: jax.Array) -> _Block:
    lower = self._start + number * self.width
    begin = jnp.minimum(lower, self._num_columns - self.width)
    return _Block(begin, lower, jnp.minimum(lower + self.width, self._stop), self.width)


def _visit_chunks(visit, carry, order: _Order, num_columns, first_column, vocab_block):
  """Folds `visit(tokens, blocks, carry)` over the chunks of all ranges, in the order of slots."""
  for number, (start, stop) in enumerate(order.ranges):
    blocks = _Blocks(start, stop, num_columns, first_column, vocab_block)
    num_tokens = order.starts[number + 1] - order.starts[number]
    carry = jax.lax.fori_loop(
      0,
      -(-num_tokens // order.chunk),
      lambda i, carry: visit(order.tokens(number, i), blocks, carry),
      carry,
    )
  return carry


def _vary_like(array: jax.Array):
  """Returns a function that marks arrays as varying over the same mesh axes as `array`."""
  axes = tuple(jax.typeof(array).manual_axis_type.varying)
  return lambda tree: jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree)
