"""The entry to attention over key intervals: checks the arguments and picks a backend.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim.
"""

import jax
import jax.numpy as jnp

from kernels import backends
from kernels.attention import reference
from kernels.attention.backend import Backend, differentiable
from kernels.attention.intervals import KeyIntervals
from kernels.attention.mosaic_gpu import MOSAIC_GPU
from kernels.attention.pallas_tpu import PALLAS_TPU
from kernels.attention.triton import TRITON
from kernels.attention.xla import XLA
from kernels.varying import vary_alike

# The best first. XLA supports everything.
BACKENDS = (PALLAS_TPU, MOSAIC_GPU, TRITON, XLA)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def attention(
  query_BxQxHxD: jax.Array,
  key_BxKxGxD: jax.Array,
  value_BxKxGxD: jax.Array,
  intervals: KeyIntervals,
  *,
  soft_cap: float | None = None,
  backend: str | Backend | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Softmax attention where each query row sees one interval of keys.

  Scores are query . key / sqrt(D). Query head h reads key/value head h // (H / G) (grouped-query
  attention, arXiv 2305.13245). Differentiable in query, key and value, through both results.

  Args:
    query_BxQxHxD: float32, bfloat16 or float16.
    key_BxKxGxD: same dtype; G divides H.
    value_BxKxGxD: same shape and dtype as the key.
    intervals: int32 key indices, `start` and `stop`, both [B, Q].
    soft_cap: if given, scores become soft_cap * tanh(scores / soft_cap) (Gemma 2, arXiv
      2408.00118).
    backend: "pallas_tpu" (TPU), "triton" (NVIDIA GPUs), "mosaic_gpu" (Hopper), "xla" (blockwise,
      runs everywhere), "reference" (materialises the scores), your own `Backend`, or None for the
      best on this platform.

  Returns:
    (out [B, Q, H, D] in the query's dtype, log_sum_exp [B, Q, H] float32). A row with an empty
    interval has out 0, log_sum_exp -inf and gradients 0.

  Raises:
    ValueError: a shape, dtype or backend is not supported; the message says what is.
  """
  check(query_BxQxHxD, key_BxKxGxD, value_BxKxGxD, intervals)
  scale = query_BxQxHxD.shape[-1] ** -0.5
  if backend == "reference":
    return reference.attention(
      query_BxQxHxD, key_BxKxGxD, value_BxKxGxD, intervals, scale=scale, soft_cap=soft_cap
    )
  backend = choose(backend, query_BxQxHxD, key_BxKxGxD)
  query, key, value, *bounds = vary_alike(query_BxQxHxD, key_BxKxGxD, value_BxKxGxD, *intervals)
  return differentiable(backend, scale, soft_cap, query, key, value, KeyIntervals(*bounds))


def choose(
  backend: str | Backend | None,
  query_BxQxHxD: jax.Array | jax.ShapeDtypeStruct,
  key_BxKxGxD: jax.Array | jax.ShapeDtypeStruct,
) -> Backend:
  """Returns the backend of that name, or the best for these shapes and dtypes on this platform.

  Raises:
    ValueError: no backend has this name, or it does not support the arguments.
  """
  if isinstance(backend, Backend):
    return backend
  return backends.choose("attention", BACKENDS, backend, query_BxQxHxD, key_BxKxGxD)


def check(query: jax.Array, key: jax.Array, value: jax.Array, intervals: KeyIntervals) -> None:
  """Raises a ValueError that names the first argument that does not fit the others."""
  B, _, H, D = query.shape
  if key.shape != value.shape or key.shape[0] != B or key.shape[3] != D or H % key.shape[2]:
    raise ValueError(
      "Attention takes query [B, Q, H, D] and key and value [B, K, G, D] where G divides H, "
      f"not {query.shape}, {key.shape} and {value.shape}."
    )
  if any(array.shape != query.shape[:2] for array in intervals):
    raise ValueError(
      f"Attention takes interval starts and stops of shape {query.shape[:2]} (the query's "
      f"[B, Q]), not {intervals[0].shape} and {intervals[1].shape}."
    )
  if query.dtype not in DTYPES or {key.dtype, value.dtype} != {query.dtype}:
    raise ValueError(
      "Attention takes query, key and value in one dtype, float32, bfloat16 or float16, not "
      f"{query.dtype}, {key.dtype} and {value.dtype}: cast them first."
    )
