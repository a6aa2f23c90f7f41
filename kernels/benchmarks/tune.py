"""Times block sizes of the kernels that this machine runs, for the tables in `block_sizes.py`.

It varies the sizes of one kernel at a time; the others keep those of the table.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import api as attention_api, packed
from kernels.attention.pallas_tpu.block_sizes import BlockSizes
from kernels.attention.triton.block_sizes import Blocks
from kernels.benchmarks.attention import Shape
from kernels.benchmarks.decode import Cache
from kernels.benchmarks.timing import failure, seconds
from kernels.decode import api as decode_api

# (operation, backend) -> kernel -> the sizes to try.
Candidates = Mapping[tuple[str, str], Mapping[str, Sequence[Any]]]

_TRITON = [
  Blocks(*sizes)
  for sizes in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3))
  if sizes[0] * sizes[1] >= 2048
]
_TRITON_DECODE = [
  Blocks(64, *sizes) for sizes in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4))
]
_MOSAIC_GPU = list(itertools.product((32, 64, 128), (2, 3, 4)))
_PALLAS_TPU = [
  BlockSizes(*sizes)
  for sizes in itertools.product((512, 1024, 2048), (512, 1024), (512, 1024, 2048))
  if sizes[1] <= sizes[0]
]
_XLA = list(itertools.product((128, 256, 512), (128, 256, 512)))
CANDIDATES: Candidates = {
  ("attention", "triton"): dict.fromkeys(("forward", "query_grad", "key_value_grad"), _TRITON),
  ("attention", "mosaic_gpu"): dict.fromkeys(
    ("forward", "query_grad", "key_value_grad"), _MOSAIC_GPU
  ),
  ("attention", "pallas_tpu"): dict.fromkeys(("forward", "query_grad", "key_grads"), _PALLAS_TPU),
  ("attention", "xla"): dict.fromkeys(("forward", "backward"), _XLA),
  ("decode", "triton"): {
    "decode": _TRITON_DECODE,
    "decode_int8": _TRITON_DECODE,
    "decode_programs": [count * 128 for count in (2, 4, 8, 16, 32)],
  },
}
KERNELS = tuple(dict.fromkeys(itertools.chain.from_iterable(CANDIDATES.values())))


def measure_sizes(
  shapes: Sequence[Shape],
  caches: Sequence[Cache],
  kernels: Sequence[str] = KERNELS,
  candidates: Candidates = CANDIDATES,
) -> Iterator[dict]:
  """One record per kernel and shape: milliseconds of every candidate, the best first.

  `row` is the text for the table. `failed` holds the sizes that do not compile or fit, with the
  reason. For a backward kernel, milliseconds are those of the whole backward pass.
  """
  is_cpu = jax.default_backend() == "cpu"
  for shape in shapes:
    arrays, intervals = shape.arrays(), packed(jnp.asarray(shape.segment_ids())[None])
    for backend in attention_api.BACKENDS:
      if backend.name == "xla" and not is_cpu:
        continue  # Its sizes are for CPUs; elsewhere it is only the fallback.
      if backend.unsupported(*arrays[:2]) is None:
        for kernel, choices in _chosen(candidates, "attention", backend, kernels):
          run = functools.partial(_attention, arrays, intervals, backend, kernel)
          yield _measured(backend.name, kernel, shape, choices, run)
  for cache in caches:
    inputs = cache.arrays()
    for reader in decode_api.BACKENDS:
      if reader.unsupported(*inputs[:2]) is None:
        for kernel, choices in _chosen(candidates, "decode", reader, kernels):
          if kernel == ("decode" if cache.is_int8 else "decode_int8"):
            continue  # This kernel reads the other kind of cache.
          run = functools.partial(_decode, inputs, reader, kernel)
          yield _measured(reader.name, kernel, cache, choices, run)


def _chosen(candidates: Candidates, operation: str, backend, kernels: Sequence[str]):
  """The kernels of a backend and their candidates."""
  of_backend = candidates.get((operation, backend.name), {})
  return [(kernel, of_backend[kernel]) for kernel in of_backend if kernel in kernels]


def _measured(
  backend: str,
  kernel: str,
  shape: Shape | Cache,
  choices: Sequence[Any],
  run: Callable[[Any], float],
) -> dict:
  taken, failed = [], {}
  for sizes in choices:
    try:
      taken.append((run(sizes) * 1e3, sizes))
    except Exception as error:  # Sizes that do not fit fail in many ways.
      failed[str(sizes)] = failure(error)
  taken.sort(key=lambda pair: pair[0])
  return {
    "backend": backend,
    "kernel": kernel,
    **dataclasses.asdict(shape),
    "row": f'"{kernel}": {taken[0][1]}' if taken else None,
    "ms": {str(sizes): round(ms, 4) for ms, sizes in taken},
    "failed": failed,
  }


def _attention(arrays, intervals, backend, kernel: str, sizes) -> float:
  *arrays, cotangent = arrays
  backend = backend.with_sizes({kernel: sizes})

  def forward(query, key, value):
    return attention_api.attention(query, key, value, intervals, backend=backend)[0]

  if kernel == "forward":
    return seconds(forward, *arrays)
  _, pull_back = jax.jit(functools.partial(jax.vjp, forward))(*arrays)
  return seconds(lambda pull_back, cotangent: pull_back(cotangent), pull_back, cotangent)


def _decode(arrays, backend, kernel: str, sizes) -> float:
  backend = backend.with_sizes({kernel: sizes})
  return seconds(lambda *args: decode_api.decode_attention(*args, backend=backend)[0], *arrays)
