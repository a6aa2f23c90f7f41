"""Rows for experts: copies of tokens, sorted by expert, and the way back.

Both directions gather, and so do their gradients: a scatter would add rows one after the other.

T tokens, k choices per token, A = T k choices, R rows, M model width, E experts, n destinations
with an equal share of the experts each, e experts of a destination, L rows per destination.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Placement(NamedTuple):
  """Where the rows of tokens are. All arrays are int32.

  Attributes:
    row_Txk: the row of each choice, in [0, R), or -1: it has none.
    choice_R: the choice of each row, token * k + index, or -1: the row is padding.
    sizes_nxe: rows of each expert. The rows of destination d begin at d L, sorted by expert.
  """

  row_Txk: jax.Array
  choice_R: jax.Array
  sizes_nxe: jax.Array


def place(
  expert_Txk: jax.Array, *, num_experts: int, destinations: int = 1, capacity: int | None = None
) -> Placement:
  """Sorts choices by expert. R is `destinations` times the most rows that one may need.

  Args:
    expert_Txk: int32, the chosen experts, which differ from each other; `num_experts`: none.
    num_experts: E.
    destinations: n, which divides E.
    capacity: the most rows of an expert; its later choices get none. None: no limit.
  """
  num_tokens, k = expert_Txk.shape
  per_destination = num_experts // destinations
  most = num_tokens * min(k, per_destination)
  if capacity is not None:
    most = min(most, per_destination * capacity)

  expert_A = expert_Txk.reshape(-1)
  order_A = jnp.argsort(expert_A, stable=True)
  rank_A = jnp.argsort(order_A)
  is_before_ExA = expert_A[None] <= jnp.arange(num_experts, dtype=jnp.int32)[:, None]
  stop_E = jnp.sum(is_before_ExA, axis=1, dtype=jnp.int32)
  start_E = jnp.concatenate([jnp.zeros_like(stop_E[:1]), stop_E[:-1]])
  sizes_E = stop_E - start_E
  if capacity is not None:
    sizes_E = jnp.minimum(sizes_E, capacity)
  sizes_nxe = sizes_E.reshape(destinations, per_destination)
  row_stop_nxe = jnp.cumsum(sizes_nxe, axis=1)
  first_row_nx1 = most * jnp.arange(destinations, dtype=jnp.int32)[:, None]
  row_start_E = (first_row_nx1 + row_stop_nxe - sizes_nxe).reshape(-1)

  # The experts of choices that name none are clipped; their rows are not used.
  own_A = jnp.minimum(expert_A, num_experts - 1)
  index_A = rank_A - start_E[own_A]
  has_row_A = (expert_A < num_experts) & (index_A < sizes_E[own_A])
  row_A = jnp.where(has_row_A, row_start_E[own_A] + index_A, -1)

  index_L = jnp.arange(most, dtype=jnp.int32)
  expert_nxL = sorted_experts(sizes_nxe, most)
  is_row_nxL = expert_nxL < per_destination
  first_nx1 = per_destination * jnp.arange(destinations, dtype=jnp.int32)[:, None]
  expert_nxL = jnp.minimum(expert_nxL, per_destination - 1) + first_nx1
  index_nxL = index_L[None] + first_row_nx1 - row_start_E[expert_nxL]
  sorted_nxL = jnp.where(is_row_nxL, start_E[expert_nxL] + index_nxL, 0)
  choice_nxL = jnp.where(is_row_nxL, order_A[sorted_nxL], -1)
  return Placement(
    row_A.reshape(num_tokens, k).astype(jnp.int32),
    choice_nxL.reshape(-1).astype(jnp.int32),
    sizes_nxe,
  )


def sorted_experts(sizes_nxe: jax.Array, num_rows: int) -> jax.Array:
  """The expert of each of L rows that are sorted by it, int32 [n, L]; e for rows after the last."""
  stop_nxe = jnp.cumsum(sizes_nxe, axis=1)
  row_L = jnp.arange(num_rows, dtype=jnp.int32)
  search = functools.partial(jnp.searchsorted, side="right", method="compare_all")
  return jax.vmap(search, in_axes=(0, None))(stop_nxe, row_L).astype(jnp.int32)


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
  return total_TxM.astype(gradient_RxM.dtype), _no_gradient(row_Txk), _no_gradient(choice_R)


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
    _no_gradient(row_Txk),
    _no_gradient(choice_R),
  )


combine.defvjp(_combine_forward, _combine_backward)


def _taken(array: jax.Array, index: jax.Array) -> jax.Array:
  """Rows of an array; 0 for the index -1."""
  return jnp.where(index[:, None] < 0, 0, array[jnp.maximum(index, 0)])


def _no_gradient(integers: jax.Array) -> np.ndarray:
  return np.zeros(integers.shape, jax.dtypes.float0)
