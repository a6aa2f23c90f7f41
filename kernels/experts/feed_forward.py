"""The feed-forward networks of experts on a mesh: dispatch, products, combination.

T local tokens, k choices per token, M model width, F local feed-forward width, E experts, P slots
of all devices, e local slots (a slot computes one expert), n devices that exchange rows, G = n T
tokens of all of them, t devices of the tensor axis. R, L and N are numbers of rows; in chunked
arrays [N, C, ...], N chunks of C tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.experts.api import grouped_matmul
from kernels.experts.backend import Backend
from kernels.experts.dispatch import combine, merge, most_rows, no_gradient, place, spread
from kernels.experts.exchange import Exchange, begins
from kernels.experts.slots import Slots
from kernels.varying import vary_alike, vary_trees_alike

# Buffers have room for this many times the mean number of rows per device. A device that gets more
# rows uses larger buffers, which have room for all rows that can arrive.
ROOM = 2


class Settings(NamedTuple):
  """How the work is divided.

  Attributes:
    num_experts: E, on all devices together.
    exchange_axes: mesh axes over which both tokens and experts are divided: tokens travel.
    expert_axes: mesh axes over which the experts of a device of `exchange_axes` are divided
      further, among devices that have the same tokens. Results are summed over them.
    tensor_axis: the mesh axis that divides F, if one does.
    has_part_of_tokens: the tokens are divided over `tensor_axis` too, instead of being the same.
    capacity_factor: the most rows of an expert from one device and chunk (or half, see `overlaps`),
      as a multiple of the mean; further choices are dropped. None: nothing is dropped.
    chunk: the most tokens at a time.
    overlaps: whether a chunk is computed in two halves, so that one travels while the products of
      the other are computed. It does not pay for few tokens.
    is_ragged: see `Exchange`.
    backend: of `grouped_matmul`.
    shared: a network of all tokens, `shared(x_CxM, shared_weights)`, whose results are added. It is
      computed with each chunk, while rows travel. Not together with `expert_axes`, or with a
      `tensor_axis` along which tokens are the same: results are summed over those.
  """

  num_experts: int
  exchange_axes: tuple[str, ...] = ()
  expert_axes: tuple[str, ...] = ()
  tensor_axis: str | None = None
  has_part_of_tokens: bool = False
  capacity_factor: float | None = None
  chunk: int = 2048
  overlaps: bool = False
  is_ragged: bool = False
  backend: str | Backend | None = None
  shared: Callable[[jax.Array, Any], jax.Array] | None = None


def expert_feed_forward(
  x_TxM: jax.Array,
  expert_Txk: jax.Array,
  share_Txk: jax.Array,
  gate_exMxF: jax.Array,
  up_exMxF: jax.Array,
  down_exFxM: jax.Array,
  settings: Settings,
  slots: Slots | None = None,
  shared_weights: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """The sum over a token's experts of share x SwiGLU of the expert, and the choices dropped.

  At most `settings.chunk` tokens are dispatched at a time, and several chunks recompute everything
  in the backward pass, so memory is that of one chunk: up to min(k, slots per device) rows per
  token and exchanging device, all of which exist only if every token chooses the same device. A
  device that gets at most `ROOM` times the mean number of rows computes at most that many rows.

  Rows travel to the devices of their experts and back (all-to-all): k (n - 1) / n rows per token
  each way. If k is at least n, every device gathers all tokens instead, and the results are
  reduce-scattered: n - 1 rows per token, which are not more.

  On a mesh, call it inside `jax.shard_map(..., check_vma=True)`. Local slots are the slice of all
  slots that belongs to a device whose number, counted along `exchange_axes` and then `expert_axes`,
  has the last axis changing fastest.

  Args:
    x_TxM: float32 or bfloat16. Products run in its dtype.
    expert_Txk: int32, the chosen experts, which differ from each other; E: none, as for padding.
    share_Txk: float32.
    gate_exMxF: in the dtype of x. With several chunks, the gradients of the weights accumulate in
      float32.
    up_exMxF: likewise.
    down_exFxM: likewise.
    settings: how the work is divided.
    slots: of all devices, as `kernels.experts.dispatch.place` takes them. None: slot i has expert
      i.
    shared_weights: a tree of arrays for `settings.shared`.

  Returns:
    [T, M] in the dtype of x, and the number of choices of these tokens that capacity dropped, a
    float32 scalar. Both vary over the axes that the tokens vary over.
  """
  tokens, weights, slots = vary_trees_alike(
    (x_TxM, expert_Txk, share_Txk), ((gate_exMxF, up_exMxF, down_exFxM), shared_weights), slots
  )
  num_chunks = -(-x_TxM.shape[0] // settings.chunk)
  run = _chunks if num_chunks == 1 else _recomputed_chunks
  num_parts = num_chunks * _parts(settings)
  out_TxM, dropped = run(num_parts, settings, tokens, weights, slots)
  summed = (*settings.expert_axes, *(() if settings.has_part_of_tokens else _tensor(settings)))
  if summed:
    # The devices along these axes counted the same choices.
    return jax.lax.psum(out_TxM, summed), jax.lax.pmean(dropped, summed)
  return out_TxM, dropped


def _tensor(settings: Settings) -> tuple[str, ...]:
  return () if settings.tensor_axis is None else (settings.tensor_axis,)


def _parts(settings: Settings) -> int:
  """In how many parts a chunk is computed."""
  return 2 if settings.overlaps and _num_devices(settings) > 1 else 1


def _num_devices(settings: Settings) -> int:
  return jax.lax.axis_size(settings.exchange_axes) if settings.exchange_axes else 1


def _whole(settings: Settings, tokens, weights, slots) -> tuple[jax.Array, jax.Array]:
  """The networks for all tokens at once."""
  own_weights, shared_weights = weights
  out_TxM, dropped = _routed(settings, tokens, own_weights, slots)
  if settings.shared is not None:
    out_TxM += settings.shared(tokens[0], shared_weights)
  return out_TxM, dropped


def _routed(settings: Settings, tokens, weights, slots) -> tuple[jax.Array, jax.Array]:
  x_TxM, expert_Txk, share_Txk = tokens
  n = _num_devices(settings)
  capacity = None
  if settings.capacity_factor is not None:
    mean = expert_Txk.size / settings.num_experts
    capacity = max(int(settings.capacity_factor * mean), 1)
  # Ragged rows for several devices are contiguous, as if they were for one device.
  placement = place(
    expert_Txk,
    num_experts=settings.num_experts,
    destinations=1 if settings.is_ragged else n,
    capacity=capacity,
    slots=slots,
  )
  chosen = jnp.sum(expert_Txk < settings.num_experts)
  dropped = (chosen - jnp.sum(placement.sizes_nxe)).astype(jnp.float32)
  if expert_Txk.shape[1] >= n > 1:
    if capacity is not None:
      expert_Txk = jnp.where(placement.row_Txk < 0, settings.num_experts, expert_Txk)
    return _ring(settings, (x_TxM, expert_Txk, share_Txk), weights, slots), dropped
  x_RxM = spread(x_TxM, placement.row_Txk, placement.choice_R)
  sent_nxe, (T, k) = placement.sizes_nxe.reshape(n, -1), expert_Txk.shape
  received = n * most_rows(T, k, sent_nxe.shape[1], capacity)
  y_RxM = _exchanged(settings, received, x_RxM, sent_nxe, expert_Txk.size, weights)
  return combine(y_RxM, share_Txk, placement.row_Txk, placement.choice_R), dropped


def _ring(settings: Settings, tokens, weights, slots):
  """All-gathers tokens, applies the local experts, and reduce-scatters the results."""
  axes = settings.exchange_axes
  x_GxM, expert_Gxk, share_Gxk = (jax.lax.all_gather(array, axes, tiled=True) for array in tokens)
  placement = place(
    expert_Gxk, num_experts=settings.num_experts, destinations=_num_devices(settings), slots=slots
  )
  row_Gxk, choice_L, sizes_1xe = placement.of(jax.lax.axis_index(axes))
  x_LxM = spread(x_GxM, row_Gxk, choice_L)
  y_LxM = _gathered(settings, x_LxM, sizes_1xe, tokens[1].size, weights)
  out_GxM = combine(y_LxM, share_Gxk, row_Gxk, choice_L)
  return jax.lax.psum_scatter(out_GxM, axes, tiled=True)


def _exchanged(settings: Settings, received: int, x_RxM, sent_nxe, choices: int, weights):
  """The networks of rows that are sorted by device and expert; their results in the same order."""
  if sent_nxe.shape[0] == 1:
    return _gathered(settings, x_RxM, sent_nxe, choices, weights)
  exchange = Exchange(settings.exchange_axes, settings.is_ragged)
  received_nxe = exchange.sizes(sent_nxe)
  sent_n, received_n = sent_nxe.sum(axis=1), received_nxe.sum(axis=1)
  R, M = x_RxM.shape
  # TPUs exchange rows in this shape. XLA would copy all rows, also empty ones, from and to another.
  split = (2, M // 2) if settings.is_ragged and M % 2 == 0 else (M,)
  x = exchange.rows(x_RxM.reshape(R, *split), sent_n, received_n, received)
  y = _gathered(settings, x, received_nxe, choices, weights)
  return exchange.rows(y, received_n, sent_n, R).reshape(R, M)


def _gathered(settings: Settings, x, sizes_nxe, choices: int, weights):
  """Local experts for the rows of n sources, and for those of the other devices of tensor_axis."""
  axis = settings.tensor_axis
  if axis is None or not settings.has_part_of_tokens or jax.lax.axis_size(axis) == 1:
    return _local(settings, x, sizes_nxe[None], choices, weights)
  x = jax.lax.all_gather(x, axis, tiled=True)
  sizes_txnxe = jax.lax.all_gather(sizes_nxe, axis)
  y = _local(settings, x, sizes_txnxe, choices, weights)
  return jax.lax.psum_scatter(y, axis, tiled=True)


def _local(settings: Settings, x, sizes_txnxe, choices: int, weights):
  """Local experts for the rows of t n sources, each sorted by expert; 0 for rows of others.

  The rows are [R, M], or M is split into two dimensions.
  """
  t, n, e = sizes_txnxe.shape
  R, *split = x.shape
  if t * n == 1 and not settings.expert_axes:
    return _swiglu(settings, x, sizes_txnxe[0, 0], weights)
  begin_txn = jnp.stack(
    [
      part * (R // t) + begins(sizes_nxe.sum(axis=1), R // t, settings.is_ragged)
      for part, sizes_nxe in enumerate(sizes_txnxe)
    ]
  )
  num_local = weights[0].shape[0]
  first: Any = 0
  if settings.expert_axes:
    first = num_local * jax.lax.axis_index(settings.expert_axes)

  def network(num_rows, x, weights):
    """The local experts, with buffers for `num_rows` rows."""
    # The rows that exist come first if they are contiguous. Otherwise they may be anywhere.
    given = num_rows if t == 1 and (settings.is_ragged or n == 1) else R
    own = merge(sizes_txnxe.reshape(-1, e), begin_txn.reshape(-1), given, first, num_local)
    choice_N = own.choice_R[:num_rows]
    x_NxM = spread(x[:given].reshape(given, -1), own.row_Txk, choice_N)
    y_NxM = _swiglu(settings, x_NxM, own.sizes_nxe[0], weights)
    y = spread(y_NxM, choice_N[:, None], own.row_Txk[:, 0]).reshape(given, *split)
    if given == R:
      return y
    empty, y = vary_alike(jax.lax.empty(x.shape, x.dtype), y)
    return jax.lax.dynamic_update_slice_in_dim(empty, y, 0, 0)

  few = min(ROOM * t * choices, R)
  everything = functools.partial(network, R)
  if few == R:
    return everything(x, weights)
  return jax.lax.cond(
    jnp.sum(sizes_txnxe) <= few,
    functools.partial(network, few),
    jax.checkpoint(everything),
    x,
    weights,
  )


def _swiglu(settings: Settings, x_RxM, sizes_e, weights):
  """Local experts for rows that are sorted by expert."""
  gate_exMxF, up_exMxF, down_exFxM = weights
  product = functools.partial(grouped_matmul, sizes_E=sizes_e, backend=settings.backend)
  return product(jax.nn.silu(product(x_RxM, gate_exMxF)) * product(x_RxM, up_exMxF), down_exFxM)


def _chunks(num_chunks: int, settings: Settings, tokens, weights, slots):
  """The networks, chunk after chunk; those of one iteration may overlap."""
  if num_chunks == 1:
    return _whole(settings, tokens, weights, slots)
  _, (out_NxCxM, dropped_N) = jax.lax.scan(
    lambda _, chunk: (None, _whole(settings, chunk, weights, slots)),
    None,
    _split(settings, tokens, num_chunks),
    unroll=_parts(settings),
  )
  num_tokens, M = tokens[0].shape
  return out_NxCxM.reshape(-1, M)[:num_tokens], jnp.sum(dropped_N)


_recomputed_chunks = jax.custom_vjp(_chunks, nondiff_argnums=(0, 1))


def _forward(num_chunks, settings, *residuals):
  return _recomputed_chunks(num_chunks, settings, *residuals), residuals


def _backward(num_chunks, settings, residuals, gradients):
  tokens, weights, slots = residuals
  out_gradient_TxM, _ = gradients

  def add_chunk(totals, chunk):
    (x_CxM, expert_Cxk, share_Cxk), out_gradient_CxM = chunk

    def network(x_CxM, share_Cxk, weights):
      return _whole(settings, (x_CxM, expert_Cxk, share_Cxk), weights, slots)[0]

    _, transpose = jax.vjp(network, x_CxM, share_Cxk, weights)
    x_gradient, share_gradient, weight_gradients = transpose(out_gradient_CxM)
    return jax.tree.map(jnp.add, totals, weight_gradients), (x_gradient, share_gradient)

  zeros = jax.tree.map(lambda weight: jnp.zeros_like(weight, jnp.float32), weights)
  chunks = _split(settings, tokens, num_chunks), _rows(out_gradient_TxM, num_chunks)
  totals, (x_gradient_NxCxM, share_gradient_NxCxk) = jax.lax.scan(
    add_chunk, zeros, chunks, unroll=_parts(settings)
  )
  x_TxM, expert_Txk, share_Txk = tokens
  num_tokens = x_TxM.shape[0]
  token_gradients = (
    x_gradient_NxCxM.reshape(-1, x_TxM.shape[1])[:num_tokens],
    no_gradient(expert_Txk),
    share_gradient_NxCxk.reshape(-1, share_Txk.shape[1])[:num_tokens],
  )
  weight_gradients = jax.tree.map(lambda total, w: total.astype(w.dtype), totals, weights)
  return token_gradients, weight_gradients, jax.tree.map(no_gradient, slots)


_recomputed_chunks.defvjp(_forward, _backward)


def _split(settings: Settings, tokens, num_chunks: int):
  """Equal chunks [N, C, ...] of tokens; the last is filled with tokens that choose no expert."""
  x_TxM, expert_Txk, share_Txk = tokens
  return (
    _rows(x_TxM, num_chunks),
    _rows(expert_Txk, num_chunks, settings.num_experts),
    _rows(share_Txk, num_chunks),
  )


def _rows(array: jax.Array, num_chunks: int, fill: int = 0) -> jax.Array:
  padding = -array.shape[0] % num_chunks
  padded = jnp.pad(array, ((0, padding), (0, 0)), constant_values=fill)
  return padded.reshape(num_chunks, -1, array.shape[1])
