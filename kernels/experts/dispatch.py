"""Rows for experts: copies of tokens, sorted by expert, and the way back.

Both directions gather, and so do their gradients: a scatter would add rows one after the other.

T tokens, k choices per token, A = T k choices, R rows, M model width, E experts, P slots; n
destinations with an equal share of the slots each, e slots of a destination, L rows per destination
or source, S sources, V runs of rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.experts.slots import WHOLE, Slots


class Placement(NamedTuple):
  """Where the rows of tokens are. All arrays are int32.

  Attributes:
    row_Txk: the row of each choice, in [0, R), or -1: it has none.
    choice_R: the choice of each row, token * k + index, or -1: the row is padding.
    sizes_nxe: rows of each slot. The rows of destination d begin at d L, sorted by slot.
  """

  row_Txk: jax.Array
  choice_R: jax.Array
  sizes_nxe: jax.Array

  def of(self, destination: jax.Array) -> "Placement":
    """The L rows of one destination; choices whose rows belong to others have none."""
    L = self.choice_R.shape[0] // self.sizes_nxe.shape[0]
    row_Txk = self.row_Txk - destination * L
    return Placement(
      jnp.where((row_Txk >= 0) & (row_Txk < L), row_Txk, -1),
      jax.lax.dynamic_slice_in_dim(self.choice_R, destination * L, L),
      jax.lax.dynamic_slice_in_dim(self.sizes_nxe, destination, 1),
    )


def place(
  expert_Txk: jax.Array,
  *,
  num_experts: int,
  destinations: int = 1,
  capacity: int | None = None,
  slots: Slots | None = None,
) -> Placement:
  """Sorts choices by slot. R is `destinations` times the most rows that one may need.

  Args:
    expert_Txk: int32, the chosen experts, which differ from each other; `num_experts`: none.
    num_experts: E.
    destinations: n, which divides P.
    capacity: the most rows of an expert; its later choices get none. None: no limit.
    slots: what each slot computes; those of one expert belong to different destinations and divide
      its rows, in the order of tokens. All experts have a slot. None: slot i has expert i.
  """
  num_tokens, k = expert_Txk.shape
  num_slots = num_experts if slots is None else slots.expert_P.shape[0]
  per_destination = num_slots // destinations
  most = most_rows(num_tokens, k, per_destination, capacity)

  expert_A = expert_Txk.reshape(-1)
  order_A = jnp.argsort(expert_A, stable=True)
  rank_A = jnp.argsort(order_A)
  is_before_ExA = expert_A[None] <= jnp.arange(num_experts, dtype=jnp.int32)[:, None]
  stop_E = jnp.sum(is_before_ExA, axis=1, dtype=jnp.int32)
  start_E = jnp.concatenate([jnp.zeros_like(stop_E[:1]), stop_E[:-1]])
  sizes_E = stop_E - start_E
  if capacity is not None:
    sizes_E = jnp.minimum(sizes_E, capacity)
  # The experts of choices that name none are clipped; their rows are not used.
  own_A = jnp.minimum(expert_A, num_experts - 1)
  index_A = rank_A - start_E[own_A]
  has_row_A = (expert_A < num_experts) & (index_A < sizes_E[own_A])
  if slots is None:
    start_P, sizes_P, slot_A = start_E, sizes_E, own_A
  else:
    start_P, sizes_P, slot_A = _divided(start_E, sizes_E, slots, own_A, index_A)
  sizes_nxe = sizes_P.reshape(destinations, per_destination)
  row_stop_nxe = jnp.cumsum(sizes_nxe, axis=1)
  first_row_nx1 = most * jnp.arange(destinations, dtype=jnp.int32)[:, None]
  row_start_P = (first_row_nx1 + row_stop_nxe - sizes_nxe).reshape(-1)
  row_A = jnp.where(has_row_A, row_start_P[slot_A] + rank_A - start_P[slot_A], -1)

  index_L = jnp.arange(most, dtype=jnp.int32)
  slot_nxL = sorted_experts(sizes_nxe, most)
  is_row_nxL = slot_nxL < per_destination
  first_nx1 = per_destination * jnp.arange(destinations, dtype=jnp.int32)[:, None]
  slot_nxL = jnp.minimum(slot_nxL, per_destination - 1) + first_nx1
  index_nxL = index_L[None] + first_row_nx1 - row_start_P[slot_nxL]
  sorted_nxL = jnp.where(is_row_nxL, start_P[slot_nxL] + index_nxL, 0)
  choice_nxL = jnp.where(is_row_nxL, order_A[sorted_nxL], -1)
  return Placement(
    row_A.reshape(num_tokens, k).astype(jnp.int32),
    choice_nxL.reshape(-1).astype(jnp.int32),
    sizes_nxe,
  )


def most_rows(num_tokens: int, k: int, num_slots: int, capacity: int | None) -> int:
  """The most rows that these slots can get; see `place`."""
  most = num_tokens * min(k, num_slots)
  return most if capacity is None else min(most, num_slots * capacity)


def _divided(start_E, sizes_E, slots: Slots, expert_A, index_A):
  """Divides the sorted choices of each expert among its slots.

  Returns:
    The first choice of each slot in their sorted order, their numbers, and the slot of each choice,
    from its expert and its index among the expert's choices.
  """
  size_P = slots.of_experts(sizes_E).astype(jnp.float32)
  begin_P, end_P = (
    jnp.round(size_P * (part_P / WHOLE)).astype(jnp.int32)
    for part_P in (slots.begin_P, slots.end_P)
  )
  is_own_PxA = slots.expert_P[:, None] == expert_A[None]
  is_own_PxA &= (begin_P[:, None] <= index_A[None]) & (index_A[None] < end_P[:, None])
  # A choice has at most one slot, so a sum finds it, and on CPUs faster than argmax.
  slot_P = jnp.arange(slots.expert_P.shape[0], dtype=jnp.int32)
  slot_A = jnp.sum(jnp.where(is_own_PxA, slot_P[:, None], 0), axis=0)
  return slots.of_experts(start_E) + begin_P, end_P - begin_P, slot_A


def sorted_experts(sizes_nxe: jax.Array, num_rows: int) -> jax.Array:
  """The expert of each of L rows that are sorted by it, int32 [n, L]; e for rows after the last."""
  stop_nxe = jnp.cumsum(sizes_nxe, axis=1)
  row_L = jnp.arange(num_rows, dtype=jnp.int32)
  search = functools.partial(jnp.searchsorted, side="right", method="compare_all")
  return jax.vmap(search, in_axes=(0, None))(stop_nxe, row_L).astype(jnp.int32)


def merge(
  sizes_Sxe: jax.Array, begin_S: jax.Array, num_rows: int, first: jax.Array | int, num_local: int
) -> Placement:
  """Merges the rows of S sources, each sorted by slot, into one order by local slot.

  Whole runs of rows move, so that no sort is needed: XLA takes 12 seconds to compile a sort of
  100,000 rows for a TPU.

  Args:
    sizes_Sxe: int32, rows of each slot.
    begin_S: int32, the first row of each source, in rising order.
    num_rows: R, of all sources together.
    first: the first local slot.
    num_local: the number of local slots.

  Returns:
    A placement with one destination of R rows, whose k = 1 choices are the given rows.
  """
  S, e = sizes_Sxe.shape
  row_R = jnp.arange(num_rows, dtype=jnp.int32)
  from_Sxe = jnp.cumsum(sizes_Sxe, axis=1) - sizes_Sxe + begin_S[:, None]
  # Runs in their new order: by slot, then by source.
  from_V, sizes_V = (
    jax.lax.dynamic_slice_in_dim(array_Sxe, first, num_local, axis=1).T.reshape(-1)
    for array_Sxe in (from_Sxe, sizes_Sxe)
  )
  stop_V = jnp.cumsum(sizes_V)
  to_V = stop_V - sizes_V
  run_R = jnp.searchsorted(stop_V, row_R, side="right", method="compare_all")
  is_row_R, run_R = run_R < stop_V.shape[0], jnp.minimum(run_R, stop_V.shape[0] - 1)
  choice_R = jnp.where(is_row_R, from_V[run_R] + row_R - to_V[run_R], -1)

  old_R = jnp.searchsorted(from_Sxe.reshape(-1), row_R, side="right", method="compare_all") - 1
  source_R, slot_R = old_R // e, old_R % e - first
  run_R = jnp.clip(slot_R, 0, num_local - 1) * S + source_R
  index_R = row_R - from_V[run_R]
  is_own_R = (slot_R >= 0) & (slot_R < num_local) & (index_R < sizes_V[run_R])
  new_row_R = jnp.where(is_own_R, to_V[run_R] + index_R, -1)
  return Placement(new_row_R[:, None], choice_R, sizes_V.reshape(num_local, S).sum(axis=1)[None])


@jax.custom_vjp
def spread(x_TxM: jax.Array, row_Txk: jax.Array, choice_R: jax.Array) -> jax.Array:
  """The token of each row, [R, M]; 0 for padding. See `Placement` for the arguments."""
  return _taken(x_TxM, jnp.where(choice_R < 0, -1, choice_R // row_Txk.shape[1]))


def _spread_forward(x_TxM, row_Txk, choice_R):
  return spread(x_TxM, row_Txk, choice_R), (row_Txk, choice_R)


def _spread_backward(residuals, gradient_RxM):
  row_Txk, choice_R = residuals
  total_TxM = functools.reduce(
    jnp.add, (_taken(gradient_RxM, row_T).astype(jnp.float32) for row_T in row_Txk.T)
  )
  return total_TxM.astype(gradient_RxM.dtype), no_gradient(row_Txk), no_gradient(choice_R)


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def combine(
  y_RxM: jax.Array, share_Txk: jax.Array, row_Txk: jax.Array, choice_R: jax.Array
) -> jax.Array:
  """The sum of a token's rows, each times the share of its choice, [T, M] in the dtype of y.

  Args:
    y_RxM: results of the rows.
    share_Txk: float32.
    row_Txk: see `Placement`; choices without a row add nothing.
    choice_R: see `Placement`.
  """
  weighted = (
    share_T[:, None] * _taken(y_RxM, row_T) for share_T, row_T in zip(share_Txk.T, row_Txk.T)
  )
  total_TxM = functools.reduce(jnp.add, weighted)
  return total_TxM.astype(y_RxM.dtype)


def _combine_forward(y_RxM, share_Txk, row_Txk, choice_R):
  return combine(y_RxM, share_Txk, row_Txk, choice_R), (y_RxM, share_Txk, row_Txk, choice_R)


def _combine_backward(residuals, gradient_TxM):
  y_RxM, share_Txk, row_Txk, choice_R = residuals
  share_R = jnp.where(choice_R < 0, 0, share_Txk.reshape(-1)[choice_R])
  y_gradient_RxM = share_R[:, None] * spread(gradient_TxM, row_Txk, choice_R)
  share_gradient_Txk = jnp.stack(
    [
      jnp.sum(gradient_TxM.astype(jnp.float32) * _taken(y_RxM, row_T), axis=1)
      for row_T in row_Txk.T
    ],
    axis=1,
  )
  return (
    y_gradient_RxM.astype(y_RxM.dtype),
    share_gradient_Txk,
    no_gradient(row_Txk),
    no_gradient(choice_R),
  )


combine.defvjp(_combine_forward, _combine_backward)


def _taken(array: jax.Array, index: jax.Array) -> jax.Array:
  """Rows of an array; 0 for the index -1."""
  return jnp.where(index[:, None] < 0, 0, array[jnp.maximum(index, 0)])


def no_gradient(integers: jax.Array) -> np.ndarray:
  """The gradient of an integer array, as `jax.custom_vjp` takes it."""
  return np.zeros(integers.shape, jax.dtypes.float0)
