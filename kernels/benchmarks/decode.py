"""How close decode attention comes to the speed of a plain copy.

K cached positions, H query heads, G key/value heads, D head_dim.
"""

import jax
import jax.numpy as jnp

from kernels.attention import KeyIntervals
from kernels.benchmarks.timing import seconds
from kernels.decode import decode_attention
from kernels.decode import quantize


def measure_decode(platform: str) -> list[dict]:
  """A record a kind of cache: milliseconds, GB/s of cache read, and its share of a copy's."""
  length, dtype = (16384, "float32") if platform == "cpu" else (1 << 20, "bfloat16")
  H, G, D = 32, 8, 128
  query = jnp.ones((1, 1, H, D), dtype)
  key = jax.random.normal(jax.random.key(0), (1, 1, length, G, D), dtype)
  start = jnp.zeros((1, 1), jnp.int32)
  intervals = KeyIntervals(start, start + length)
  # A copy reads and writes.
  copy_rate = 2 * key.nbytes / seconds(jnp.copy, key)
  records = []
  for name, cache in ((dtype, key), ("int8", jax.jit(quantize)(key))):
    num_bytes = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    value = jax.tree.map(jnp.copy, cache)
    taken = seconds(lambda *args: decode_attention(*args)[0], query, cache, value, intervals)
    records.append({
        "cache": name, "positions": length, "num_heads": H, "num_kv_heads": G, "head_dim": D,
        "ms": taken * 1e3, "gigabytes_per_second": num_bytes / taken / 1e9,
        "share_of_copy": num_bytes / taken / copy_rate,
    })
  return records
