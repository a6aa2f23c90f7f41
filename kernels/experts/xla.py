"""The grouped product in plain JAX, for CPUs: a loop over blocks of rows.

`jax.lax.ragged_dot` would multiply every row by the matrices of all groups there.

R rows, K inputs, N outputs, E groups (experts), b rows per block.
"""

import jax
import jax.numpy as jnp

from kernels.experts.backend import Backend, dot
from kernels.experts.visits import Visits, visits
from kernels.varying import vary_alike

# The most rows per block. Smaller blocks waste less at the ends of groups; larger ones are faster.
BLOCK_ROWS = 128


def product(
  x: jax.Array, weight_ExKxN: jax.Array, sizes_E: jax.Array, *, transposed: bool
) -> jax.Array:
  """See `kernels.experts.backend.Product`."""
  num_rows = x.shape[0]
  own, (x,) = _in_blocks(sizes_E, x)

  def visit(index, out):
    weight = weight_ExKxN[own.group_V[index]]
    new = dot(own.rows(x, index), weight, (1, 1 if transposed else 0)).astype(out.dtype)
    new = jnp.where(own.is_own(index), new, own.rows(out, index))
    return jax.lax.dynamic_update_slice_in_dim(out, new, own.block_V[index] * own.block, 0)

  width = weight_ExKxN.shape[1 if transposed else 2]
  out, _ = vary_alike(jnp.zeros((x.shape[0], width), x.dtype), x)
  return jax.lax.fori_loop(0, own.num_visits, visit, out)[:num_rows]


def outer(x_RxK: jax.Array, y_RxN: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """See `kernels.experts.backend.Outer`."""
  own, (x_RxK, y_RxN) = _in_blocks(sizes_E, x_RxK, y_RxN)

  def visit(index, out_ExKxN):
    group, is_own = own.group_V[index], own.is_own(index)
    x_bxK = jnp.where(is_own, own.rows(x_RxK, index), 0)
    y_bxN = jnp.where(is_own, own.rows(y_RxN, index), 0)
    new_KxN = out_ExKxN[group] + dot(x_bxK, y_bxN, (0, 0))
    return jax.lax.dynamic_update_index_in_dim(out_ExKxN, new_KxN, group, 0)

  shape = sizes_E.shape[0], x_RxK.shape[1], y_RxN.shape[1]
  out_ExKxN, _ = vary_alike(jnp.zeros(shape, jnp.float32), x_RxK)
  return jax.lax.fori_loop(0, own.num_visits, visit, out_ExKxN)


def unsupported(x_RxK: jax.Array, weight_ExKxN: jax.Array) -> str | None:
  """Why this backend does not run here, or None; see `kernels.backends.Backend`."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = device.platform if device else jax.default_backend()
  return None if platform == "cpu" else "its blocks are made for CPUs; use 'ragged_dot'"


XLA = Backend("xla", unsupported, product, outer)


def _in_blocks(sizes_E: jax.Array, *arrays: jax.Array) -> tuple[Visits, list[jax.Array]]:
  """The visits, and the arrays padded to whole blocks of rows."""
  num_rows = arrays[0].shape[0]
  block = min(BLOCK_ROWS, num_rows)
  num_blocks = -(-num_rows // block)
  padded = [jnp.pad(array, ((0, num_blocks * block - num_rows), (0, 0))) for array in arrays]
  return visits(sizes_E, num_blocks, block), padded
