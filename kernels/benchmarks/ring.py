"""Measures what balanced work and skipped blocks save in a ring of up to eight devices."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from kernels.attention import KeyIntervals, causal, packed
from kernels.benchmarks.timing import seconds
from kernels.ring import Layout, blocks_per_device, ring_attention

BLOCK = 256


def measure_ring(length: int = 32768, num_heads: int = 1, head_dim: int = 64) -> list[dict]:
  """One record per case: seconds of forward and backward, and blocks of the busiest device.

  `ratio` compares with the case that `of` names. Intervals of all keys make every hop compute every
  block, as a ring without skipping would.
  """
  devices = jax.devices()[:8]
  n = len(devices)
  mesh = jax.make_mesh((n,), ("ring",), (AxisType.Explicit,), devices=devices)
  one = causal(1, length)
  every = KeyIntervals(jnp.zeros_like(one.start_BxQ), jnp.full_like(one.stop_BxQ, length))
  document = length // 16
  documents = packed(jnp.arange(length, dtype=jnp.int32)[None] // document + 1)
  cases: tuple[tuple[str, Literal["contiguous", "zigzag"], KeyIntervals, str | None], ...] = (
    ("every block, zigzag", "zigzag", every, None),
    ("causal, contiguous", "contiguous", one, "every block, zigzag"),
    ("causal, zigzag", "zigzag", one, "every block, zigzag"),
    (f"documents of {document}, zigzag", "zigzag", documents, "causal, zigzag"),
  )
  records: dict[str, dict[str, Any]] = {}
  for name, kind, intervals, of in cases:
    layout = Layout(kind, n)
    taken = _seconds(mesh, layout, intervals, num_heads, head_dim)
    records[name] = {
      "case": name,
      "length": length,
      "ring": n,
      "seconds": taken,
      "busiest_blocks": int(blocks_per_device(intervals, layout, BLOCK).max()),
      "of": of,
      "ratio": taken / records[of]["seconds"] if of else None,
    }
  return list(records.values())


def _seconds(mesh, layout: Layout, intervals: KeyIntervals, num_heads: int, head_dim: int) -> float:
  """Seconds of forward and backward for one row."""
  length = intervals.start_BxQ.shape[1]
  spec = PartitionSpec(None, "ring")
  sharding = jax.NamedSharding(mesh, spec)
  order = layout.permutation(length)
  random = np.random.default_rng(0)
  arrays = [
    jax.device_put(random.standard_normal((1, length, num_heads, head_dim)), sharding).astype(
      jnp.bfloat16
    )
    for _ in range(4)
  ]
  intervals = jax.tree.map(lambda array: jax.device_put(array[:, order], sharding), intervals)
  attend = jax.shard_map(
    lambda *args: ring_attention(*args, layout=layout, axis_name="ring")[0],
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
  )

  def forward_and_backward(query, key, value, cotangent, intervals):
    out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, intervals), query, key, value)
    return out, pull_back(cotangent)

  with jax.set_mesh(mesh):
    return seconds(forward_and_backward, *arrays, intervals)
