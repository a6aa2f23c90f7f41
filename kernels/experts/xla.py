"""The grouped product in plain JAX, for CPUs: a loop over blocks of rows.

`jax.lax.ragged_dot` would multiply every row by the matrices of all groups there.

R rows, K inputs, N outputs, E groups (experts), b rows per block.
"""

import jax
import jax.numpy as jnp

from kernels.experts.backend import Backend, dot
from kernels.varying import vary_alike

# The most rows per block. Smaller blocks waste less at the ends of groups; larger ones are faster.
BLOCK_ROWS = 128


def product(
  x: jax.Array, weight_ExKxN: jax.Array, sizes_E: jax.Array, *, transposed: bool
) -> jax.Array:
  """See `kernels.experts.backend.Product`."""
  own = _Blocks(sizes_E, x.shape[0])

  def visit(index, out):
    group, row, is_own = own.block(index)
    new = dot(own.rows(x, row), weight_ExKxN[group], (1, 1 if transposed else 0))
    new = jnp.where(is_own, new.astype(out.dtype), own.rows(out, row))
    return jax.lax.dynamic_update_slice_in_dim(out, new, row, 0)

  width = weight_ExKxN.shape[1 if transposed else 2]
  out, _ = vary_alike(jnp.zeros((x.shape[0], width), x.dtype), x)
  return jax.lax.fori_loop(0, own.number, visit, out)


def outer(x_RxK: jax.Array, y_RxN: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """See `kernels.experts.backend.Outer`."""
  own = _Blocks(sizes_E, x_RxK.shape[0])

  def visit(index, out_ExKxN):
    group, row, is_own = own.block(index)
    x_bxK = jnp.where(is_own, own.rows(x_RxK, row), 0)
    y_bxN = jnp.where(is_own, own.rows(y_RxN, row), 0)
    new_KxN = out_ExKxN[group] + dot(x_bxK, y_bxN, (0, 0))
    return jax.lax.dynamic_update_index_in_dim(out_ExKxN, new_KxN, group, 0)

  shape = sizes_E.shape[0], x_RxK.shape[1], y_RxN.shape[1]
  out_ExKxN, _ = vary_alike(jnp.zeros(shape, jnp.float32), x_RxK)
  return jax.lax.fori_loop(0, own.number, visit, out_ExKxN)


def unsupported(x_RxK: jax.Array, weight_ExKxN: jax.Array) -> str | None:
  """Why this backend does not run here, or None; see `kernels.backends.Backend`."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = device.platform if device else jax.default_backend()
  return None if platform == "cpu" else "its blocks are made for CPUs; use 'ragged_dot'"


XLA = Backend("xla", unsupported, product, outer)


class _Blocks:
  """The blocks of rows of all groups; each group's first block begins at its first row."""

  def __init__(self, sizes_E: jax.Array, num_rows: int):
    self._num_rows, self._size = num_rows, min(BLOCK_ROWS, num_rows)
    self._start_E, self._stop_E = jnp.cumsum(sizes_E) - sizes_E, jnp.cumsum(sizes_E)
    self._blocks_E = -(-sizes_E // self._size)
    self._blocks_stop_E = jnp.cumsum(self._blocks_E)
    self.number = self._blocks_stop_E[-1]

  def block(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The group of a block, its first row, and which of its rows are its own, bool [b, 1]."""
    group = jnp.sum(self._blocks_stop_E <= index)
    index -= self._blocks_stop_E[group] - self._blocks_E[group]
    own_row = self._start_E[group] + index * self._size
    # The last block may reach back into rows of others, so that it ends in the array.
    row = jnp.minimum(own_row, self._num_rows - self._size)
    row_bx1 = row + jnp.arange(self._size)[:, None]
    return group, row, (row_bx1 >= own_row) & (row_bx1 < self._stop_E[group])

  def rows(self, array: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, row, self._size)
