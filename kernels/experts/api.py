"""The entry to grouped products: checks the arguments and picks a backend.

R rows, K inputs, N outputs, E groups (experts).
"""

import jax
import jax.numpy as jnp

from kernels import backends
from kernels.experts import reference
from kernels.experts.backend import Backend, differentiable
from kernels.experts.pallas_tpu import PALLAS_TPU
from kernels.experts.ragged_dot import RAGGED_DOT
from kernels.experts.triton import TRITON
from kernels.experts.xla import XLA
from kernels.varying import vary_alike

# The best first. `ragged_dot` supports everything.
BACKENDS = (PALLAS_TPU, TRITON, XLA, RAGGED_DOT)


def grouped_matmul(
  x_RxK: jax.Array,
  weight_ExKxN: jax.Array,
  sizes_E: jax.Array,
  *,
  backend: str | Backend | None = None,
) -> jax.Array:
  """Each row times the matrix of its group; differentiable in x and the weights.

  The first sizes[0] rows belong to group 0, the next sizes[1] rows to group 1, and so on. Rows
  after the last group cost nothing, give 0 and have gradients of 0. Products accumulate in float32.
  On a mesh, call it inside `jax.shard_map`.

  Args:
    x_RxK: float32 or bfloat16, sorted by group.
    weight_ExKxN: same dtype.
    sizes_E: int32, rows per group; may be 0. Their sum is at most R.
    backend: "pallas_tpu" (TPU), "triton" (NVIDIA GPU), "xla" (CPU), "ragged_dot" (runs everywhere),
      "reference" (a loop over groups), your own `Backend`, or None for the best on this platform.

  Returns:
    [R, N] in the dtype of x.

  Raises:
    ValueError: a shape, dtype or backend is not supported; the message says what is.
  """
  check(x_RxK, weight_ExKxN, sizes_E)
  if backend == "reference":
    return reference.grouped_matmul(x_RxK, weight_ExKxN, sizes_E)
  backend = choose(backend, x_RxK, weight_ExKxN)
  return differentiable(backend, *vary_alike(x_RxK, weight_ExKxN, sizes_E))


def choose(
  backend: str | Backend | None,
  x_RxK: jax.Array | jax.ShapeDtypeStruct,
  weight_ExKxN: jax.Array | jax.ShapeDtypeStruct,
) -> Backend:
  """Returns the backend of that name, or the best for these shapes and dtypes on this platform.

  Raises:
    ValueError: no backend has this name, or it does not support the arguments.
  """
  if isinstance(backend, Backend):
    return backend
  return backends.choose("grouped product", BACKENDS, backend, x_RxK, weight_ExKxN)


def check(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> None:
  """Raises a ValueError that names the first argument that does not fit the others."""
  if x.ndim != 2 or weight.ndim != 3 or weight.shape[1] != x.shape[1]:
    raise ValueError(
      f"A grouped product takes x [R, K] and weights [E, K, N], not {x.shape} and {weight.shape}."
    )
  if sizes.shape != weight.shape[:1] or sizes.dtype != jnp.int32:
    raise ValueError(
      f"A grouped product takes int32 sizes of shape {weight.shape[:1]} (one per matrix), not "
      f"{sizes.dtype} {sizes.shape}."
    )
  if x.dtype not in (jnp.float32, jnp.bfloat16) or weight.dtype != x.dtype:
    raise ValueError(
      "A grouped product takes x and weights in one dtype, float32 or bfloat16, not "
      f"{x.dtype} and {weight.dtype}: cast them first."
    )
