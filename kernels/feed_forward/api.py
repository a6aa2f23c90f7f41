"""SwiGLU in chunks of the sequence, so that the [S, F] intermediate never exists.

The method is from Blockwise Parallel Transformer (arXiv 2305.19370), section 3.

B batch, S local sequence length, M model width, F local feed-forward width, N chunks, C tokens per
chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.feed_forward import reference
from kernels.feed_forward.reference import Linear, dense
from kernels.neighbours import gather_tokens, scatter_tokens
from kernels.varying import vary_trees_alike


def feed_forward(
  x_BxSxM: jax.Array,
  gate_MxF: Any,
  up_MxF: Any,
  down_FxM: Any,
  *,
  chunk: int,
  axis_name: str | None = None,
  has_part_of_tokens: bool = False,
  linear: Linear = dense,
) -> jax.Array:
  """silu(x gate) * (x up), projected down, for at most `chunk` tokens of each row at a time.

  The backward pass recomputes the intermediate of each chunk. A sequence of at most `chunk` tokens
  uses the plain expression, whose intermediate the caller's rematerialisation may save.

  On a mesh, call it inside `jax.shard_map(..., check_vma=True)`, with x sharded over batch and
  sequence, and the weights sharded over F along `axis_name`, over which the results are summed.
  Chunks are then cut from the local tokens, and the gradients of the weights are summed over the
  axes of the tokens once, not in every chunk. With `has_part_of_tokens`, the sequence of x and of
  the result is also sharded over `axis_name` (Megatron's sequence parallelism, arXiv 2205.05198).
  Each chunk is gathered before its products and their sums are scattered after them, so that no
  device ever holds all tokens of its neighbours.

  Args:
    x_BxSxM: float. Products run in its dtype.
    gate_MxF: a float array, or the tree of arrays that `linear` takes. With several chunks, the
      gradients of the weights accumulate in float32.
    up_MxF: likewise.
    down_FxM: likewise.
    chunk: the most tokens per row at a time.
    axis_name: the mesh axis that shards F.
    has_part_of_tokens: whether x is this device's equal part of the tokens along `axis_name`.
    linear: the product of tokens with weights.

  Returns:
    [B, S, M] in the dtype of x.
  """
  x_BxSxM, *weights = vary_trees_alike(x_BxSxM, gate_MxF, up_MxF, down_FxM)
  token_axis = axis_name if has_part_of_tokens else None
  length = x_BxSxM.shape[1] * (jax.lax.axis_size(token_axis) if token_axis else 1)
  num_chunks = -(-length // chunk)
  if num_chunks == 1:
    out_BxSxM = _whole(token_axis, linear, x_BxSxM, weights)
  else:
    out_BxSxM = _by_chunks(num_chunks, token_axis, linear, x_BxSxM, weights)
  if axis_name is None or has_part_of_tokens:
    return out_BxSxM
  return jax.lax.psum(out_BxSxM, axis_name)


def _whole(token_axis: str | None, linear: Linear, x_BxSxM, weights):
  """The network for these tokens and those of the other devices of `token_axis`, if given."""
  gate_MxF, up_MxF, down_FxM = weights
  if token_axis is None:
    return reference.feed_forward(x_BxSxM, gate_MxF, up_MxF, down_FxM, linear)
  x_BxSxM = gather_tokens(x_BxSxM, token_axis)
  out_BxSxM = reference.feed_forward(x_BxSxM, gate_MxF, up_MxF, down_FxM, linear)
  return scatter_tokens(out_BxSxM, token_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _by_chunks(num_chunks: int, token_axis: str | None, linear: Linear, x_BxSxM, weights):
  out_NxBxCxM = jax.lax.map(
    lambda x_BxCxM: _whole(token_axis, linear, x_BxCxM, weights), _split(x_BxSxM, num_chunks)
  )
  return _join(out_NxBxCxM, x_BxSxM.shape[1])


def _forward(num_chunks, token_axis, linear, x_BxSxM, weights):
  return _by_chunks.fun(num_chunks, token_axis, linear, x_BxSxM, weights), (x_BxSxM, weights)


def _backward(num_chunks, token_axis, linear, residuals, out_gradient_BxSxM):
  x_BxSxM, weights = residuals

  def add_chunk(totals, chunk):
    x_BxCxM, out_gradient_BxCxM = chunk
    _, transpose = jax.vjp(functools.partial(_whole, token_axis, linear), x_BxCxM, weights)
    x_gradient_BxCxM, gradients = transpose(out_gradient_BxCxM)
    return jax.tree.map(jnp.add, totals, gradients), x_gradient_BxCxM

  zeros = jax.tree.map(lambda weight: jnp.zeros_like(weight, jnp.float32), weights)
  chunks = _split(x_BxSxM, num_chunks), _split(out_gradient_BxSxM, num_chunks)
  totals, x_gradient_NxBxCxM = jax.lax.scan(add_chunk, zeros, chunks)
  gradients = jax.tree.map(lambda total, weight: total.astype(weight.dtype), totals, weights)
  return _join(x_gradient_NxBxCxM, x_BxSxM.shape[1]), gradients


_by_chunks.defvjp(_forward, _backward)


def _split(x_BxSxM: jax.Array, num_chunks: int) -> jax.Array:
  """[N, B, C, M]: equal chunks, the last padded with zeros."""
  batch, length, width = x_BxSxM.shape
  padded_BxSxM = jnp.pad(x_BxSxM, ((0, 0), (0, -length % num_chunks), (0, 0)))
  return padded_BxSxM.reshape(batch, num_chunks, -1, width).swapaxes(0, 1)


def _join(x_NxBxCxM: jax.Array, length: int) -> jax.Array:
  """The inverse of `_split`."""
  batch, width = x_NxBxCxM.shape[1], x_NxBxCxM.shape[3]
  return x_NxBxCxM.swapaxes(0, 1).reshape(batch, -1, width)[:, :length]
