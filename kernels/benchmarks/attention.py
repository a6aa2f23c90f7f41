"""Compares attention with all other implementations that run on this machine, in one run.

B batch, S sequence length, H query heads, G key/value heads, D head_dim.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from kernels.attention import Backend, KeyIntervals, attention, packed
from kernels.attention.api import BACKENDS
from kernels.benchmarks.timing import failure, seconds

# (query, key, value [B, S, H or G, D]) -> out.
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Shape:
  """One causal row of documents of mean length `document_length`, or of one document if None."""

  length: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  dtype: str
  document_length: int | None = None

  def segment_ids(self) -> np.ndarray:
    """The segment ids [S] of a row without padding, with lengths from 1/4 to 7/4 of the mean."""
    if self.document_length is None:
      return np.ones(self.length, np.int32)
    random = np.random.default_rng(0)
    count = 4 * self.length // self.document_length
    mean = self.document_length
    ends = np.cumsum(random.integers(mean // 4, mean * 7 // 4, count))
    return (np.searchsorted(ends, np.arange(self.length), side="right") + 1).astype(np.int32)

  def arrays(self) -> list[jax.Array]:
    """Returns query, key, value and the cotangent of out."""
    random = np.random.default_rng(0)
    heads = self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads
    return [
      jnp.asarray(random.standard_normal((1, self.length, h, self.head_dim)), self.dtype)
      for h in heads
    ]


def shapes(platform: str) -> tuple[Shape, ...]:
  """The shapes to measure: FlashAttention-3's causal ones, and documents of 4K in 32K tokens."""
  if platform == "cpu":
    return Shape(2048, 4, 4, 64, "float32"), Shape(2048, 4, 4, 64, "float32", 256)
  causal = tuple(Shape(length, 16, 16, 128, "bfloat16") for length in (16384, 32768))
  return *causal, dataclasses.replace(causal[-1], document_length=4096)


def measure_attention(shape: Shape) -> list[dict]:
  """One record per implementation: milliseconds, TFLOP/s, and the difference from the first one.

  TFLOP/s count the pairs of query and key that the mask keeps. `backward_*` is the backward pass
  alone. An implementation that should run but fails has `error` instead.
  """
  segment_ids_1xS = jnp.asarray(shape.segment_ids())[None]
  intervals = packed(segment_ids_1xS)
  pairs = int(np.sum(np.asarray(intervals.stop_BxQ - intervals.start_BxQ), dtype=np.int64))
  # Two matrix products forward, five backward, two FLOPs per element.
  flops = 4 * pairs * shape.num_heads * shape.head_dim
  *arrays, cotangent = shape.arrays()
  records, first = [], None
  for name, peer in peers(shape, intervals):
    record = {"peer": name, **dataclasses.asdict(shape)}
    records.append(record)
    try:
      out = jax.jit(peer)(*arrays)
      first = out if first is None else first
      difference = jnp.abs(out.astype("float32") - first.astype("float32"))
      record["difference"] = float(jnp.max(difference))
      record |= _speed("forward", seconds(peer, *arrays), flops)
      _, pull_back = jax.jit(functools.partial(jax.vjp, peer))(*arrays)
      taken = seconds(lambda pull_back, cotangent: pull_back(cotangent), pull_back, cotangent)
      record |= _speed("backward", taken, 2.5 * flops)
    except Exception as error:
      # A peer may raise anything, also out of memory; the others are still measured.
      record["error"] = failure(error)
  return records


def peers(shape: Shape, intervals: KeyIntervals) -> Iterator[tuple[str, Attention]]:
  """Names and functions of the implementations that should run on this machine, ours first."""
  device = jax.devices()[0]
  query, key = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in shape.arrays()[:2])
  for backend in BACKENDS:
    if backend.unsupported(query, key) is None:
      yield f"ours {backend.name}", ours(backend, intervals)
  is_packed = shape.document_length is not None
  # The plain JAX version of jax.nn holds S x S scores, and a mask of that shape for documents.
  is_short = shape.length <= 8192
  if not is_packed:
    causal = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    if is_short:
      yield "jax.nn xla", functools.partial(causal, implementation="xla")
    if device.platform == "gpu":
      yield "jax.nn cudnn", functools.partial(causal, implementation="cudnn")
  elif is_short:
    ids_S = jnp.asarray(shape.segment_ids())
    mask_SxS = (ids_S[:, None] == ids_S[None]) & jnp.tri(shape.length, dtype=bool)
    masked = functools.partial(jax.nn.dot_product_attention, mask=mask_SxS[None, None])
    yield "jax.nn xla", functools.partial(masked, implementation="xla")
  if device.platform == "tpu":
    yield "jax splash", splash(shape)
  if device.platform == "gpu" and not is_packed and importlib.util.find_spec("tokamax"):
    tokamax = importlib.import_module("tokamax")
    yield "tokamax", functools.partial(tokamax.dot_product_attention, is_causal=True)


def ours(backend: Backend, intervals: KeyIntervals) -> Attention:
  """One of our backends."""
  return lambda query, key, value: attention(query, key, value, intervals, backend=backend)[0]


def splash(shape: Shape) -> Attention:
  """JAX's kernel for TPUs, with larger blocks than its default."""
  sizes: dict[str, Any] = dict.fromkeys(
    (
      "block_q",
      "block_kv",
      "block_kv_compute",
      "block_q_dkv",
      "block_kv_dkv",
      "block_kv_dkv_compute",
      "block_q_dq",
      "block_kv_dq",
    ),
    min(1024, shape.length),
  )
  mask = splash_attention.CausalMask((shape.length, shape.length))
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([mask] * shape.num_heads),
    block_sizes=splash_attention.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
  )
  ids_S = jnp.asarray(shape.segment_ids())
  segments = splash_attention.SegmentIds(ids_S, ids_S)

  def run(query_BxSxHxD, key_BxSxGxD, value_BxSxGxD):
    arrays = (query_BxSxHxD * shape.head_dim**-0.5, key_BxSxGxD, value_BxSxGxD)
    heads_first = (jnp.swapaxes(array, 1, 2) for array in arrays)
    run_row = jax.vmap(lambda *row: kernel(*row, segment_ids=segments))
    return jnp.swapaxes(run_row(*heads_first), 1, 2)

  return run


def _speed(direction: str, taken: float, flops: float) -> dict:
  return {f"{direction}_ms": taken * 1e3, f"{direction}_tflops": flops / taken / 1e12}
