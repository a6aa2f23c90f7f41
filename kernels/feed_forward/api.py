"""SwiGLU in blocks of the sequence: the [S, F] intermediate never exists.

Blockwise Parallel Transformer (arXiv 2305.19370), section 3. Shapes: B batch, S sequence (the local
part), M model width, F feed-forward width (the local part), N chunks, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from kernels.feed_forward import reference
from kernels.varying import vary_alike


def feed_forward(
    x_BxSxM: jax.Array,
    gate_MxF: jax.Array,
    up_MxF: jax.Array,
    down_FxM: jax.Array,
    *,
    chunk: int,
    axis_name: str | None = None,
) -> jax.Array:
  """silu(x gate) * (x up), projected down, at most `chunk` tokens of each row at a time.

  The backward pass computes a chunk's intermediate again. A sequence no longer than `chunk` is the
  plain expression, whose intermediate the caller's own rematerialisation may keep.

  On a mesh, call it inside `jax.shard_map(..., check_vma=True)`, so that chunks are cut from the
  local tokens, and the weights' gradients are summed over the axes of the tokens once and not in
  every chunk: x with spec (batch axes, sequence axes, None), `gate_MxF` and `up_MxF` (None,
  "tensor"), `down_FxM` ("tensor", None), result like x; `axis_name="tensor"` adds its parts up.

  Args:
    x_BxSxM: float. Products run in its dtype.
    gate_MxF: float; over chunks its gradient accumulates in float32, as for the other weights.
    up_MxF: float.
    down_FxM: float.
    chunk: tokens.
    axis_name: mesh axis that F is sharded over.

  Returns:
    [B, S, M] in x's dtype.
  """
  x_BxSxM, *weights = vary_alike(x_BxSxM, gate_MxF, up_MxF, down_FxM)
  if x_BxSxM.shape[1] <= chunk:
    out_BxSxM = reference.feed_forward(x_BxSxM, *weights)
  else:
    out_BxSxM = _by_chunks(x_BxSxM, weights, chunk)
  return out_BxSxM if axis_name is None else jax.lax.psum(out_BxSxM, axis_name)


def _by_chunks(x_BxSxM: jax.Array, weights: list[jax.Array], chunk: int) -> jax.Array:
  batch, length, width = x_BxSxM.shape
  num_chunks = -(-length // chunk)
  even_chunk = -(-length // num_chunks)
  padding = num_chunks * even_chunk - length
  padded_BxSxM = jnp.pad(x_BxSxM, ((0, 0), (0, padding), (0, 0)))
  x_NxBxCxM = padded_BxSxM.reshape(batch, num_chunks, even_chunk, width).swapaxes(0, 1)
  # The loop's transpose adds gradients up in the dtype of what it reads.
  weights = [weight.astype(jnp.float32) for weight in weights]

  @jax.checkpoint
  def one_chunk(x_BxCxM):
    return reference.feed_forward(x_BxCxM, *weights)

  out_NxBxCxM = jax.lax.map(one_chunk, x_NxBxCxM)
  return out_NxBxCxM.swapaxes(0, 1).reshape(batch, -1, width)[:, :length]
