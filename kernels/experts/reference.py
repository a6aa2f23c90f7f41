"""The definition of a grouped product: one product per group, in a loop.

R rows, K inputs, N outputs, E groups (experts).
"""

import jax
import jax.numpy as jnp


def grouped_matmul(x_RxK: jax.Array, weight_ExKxN: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """Each row times the matrix of its group, [R, N] in the dtype of x.

  The first sizes[0] rows belong to group 0, the next sizes[1] rows to group 1, and so on. Rows
  after the last group give 0.
  """
  stop_E = jnp.cumsum(sizes_E)
  row_R = jnp.arange(x_RxK.shape[0])
  out_RxN = jnp.zeros((x_RxK.shape[0], weight_ExKxN.shape[2]), jnp.float32)
  for group, weight_KxN in enumerate(weight_ExKxN):
    product_RxN = jnp.dot(
      x_RxK, weight_KxN, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    is_in_group_R = (row_R >= stop_E[group] - sizes_E[group]) & (row_R < stop_E[group])
    out_RxN = jnp.where(is_in_group_R[:, None], product_RxN, out_RxN)
  return out_RxN.astype(x_RxK.dtype)
