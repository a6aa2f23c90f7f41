"""Compares the speed of decode attention with that of a plain copy.

K cached positions, H query heads, G key/value heads, D head_dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.attention import KeyIntervals
from kernels.benchmarks.timing import failure, seconds
from kernels.decode import api, quantize


@dataclasses.dataclass(frozen=True)
class Cache:
  """Full caches of keys and values, in the query's `dtype` or int8, and one query token."""

  positions: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  dtype: str
  is_int8: bool = False

  def arrays(self) -> tuple:
    """Returns the query, the caches of keys and values, and the intervals."""
    query = jnp.ones((1, 1, self.num_heads, self.head_dim), self.dtype)
    shape = (1, 1, self.positions, self.num_kv_heads, self.head_dim)
    key = jax.random.normal(jax.random.key(0), shape, self.dtype)
    key = jax.jit(quantize)(key) if self.is_int8 else key
    start = jnp.zeros((1, 1), jnp.int32)
    return query, key, jax.tree.map(jnp.copy, key), KeyIntervals(start, start + self.positions)


def caches(platform: str) -> tuple[Cache, ...]:
  """The caches to measure: on accelerators a million positions, in floats and in int8."""
  length, dtype = (16384, "float32") if platform == "cpu" else (1 << 20, "bfloat16")
  cache = Cache(length, 32, 8, 128, dtype)
  return cache, dataclasses.replace(cache, is_int8=True)


def measure_decode(cache: Cache) -> list[dict]:
  """One record per backend: milliseconds, GB/s of cache read, and their share of a copy's GB/s.

  The best backend for this machine is first. The copy reads and writes as many floats as the cache
  has keys. A backend that supports the arguments but fails has `error` instead.
  """
  query, key, value, intervals = cache.arrays()
  num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((key, value)))
  shape = jax.tree.leaves(key)[0].shape
  source = jnp.ones(shape, cache.dtype)
  copy_rate = 2 * source.nbytes / seconds(jnp.copy, source)
  records = []
  for backend in api.BACKENDS:
    if backend.unsupported(query, key) is not None:
      continue
    record = {"backend": backend.name, **dataclasses.asdict(cache)}
    records.append(record)
    try:
      taken = seconds(
        lambda *args, b=backend: api.decode_attention(*args, backend=b)[0],
        query,
        key,
        value,
        intervals,
      )
    except Exception as error:
      record["error"] = failure(error)
      continue
    record |= {
      "ms": taken * 1e3,
      "gigabytes_per_second": num_bytes / taken / 1e9,
      "share_of_copy": num_bytes / taken / copy_rate,
    }
  return records
