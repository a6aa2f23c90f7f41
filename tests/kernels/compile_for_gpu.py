"""Compiles a kernel inside `jax.jit` for a GPU, on a machine without one.

  python -m tests.kernels.compile_for_gpu GPU PROGRAM HEAD_DIM DTYPE LENGTH

GPU is one of those in `lwm.plan.gpu_target`. PROGRAM is one of

  triton, mosaic_gpu    forward and backward of attention by that backend
  decode, decode_int8   a token is written to a cache and Triton attends to it, layer by layer
  experts               forward and backward of a grouped product, by Triton, of LENGTH rows with 8
                        matrices of 8 HEAD_DIM inputs and four times as many outputs

It prints as JSON the bytes of arguments, results and temporaries, and the bytes of registers that
each Mosaic GPU kernel spills per thread. It needs JAX's CUDA plugin.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp

from kernels.attention import KeyIntervals, attention
from kernels.decode import Quantized, decode_attention, quantize, write
from kernels.experts import grouped_matmul
from lwm.plan import topology

B, H, G, LAYERS, EXPERTS = 1, 8, 2, 2, 8


def mesh(gpu: str) -> jax.sharding.Mesh:
  """A mesh of one GPU, which this machine need not have."""
  return jax.sharding.Mesh(topology.load(f"{gpu}:1x1").devices, ("data",))


def compile_program(gpu: str, program: str, *, D: int, dtype: str, length: int):
  """Returns the compiled program, whose intervals are data."""
  gpu_mesh = mesh(gpu)
  sharding = jax.NamedSharding(gpu_mesh, jax.P())

  def of(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  if program.startswith("decode"):
    cache = of(LAYERS, B, length, G, D)
    if program == "decode_int8":
      cache = Quantized(of(*cache.shape, dtype=jnp.int8), of(*cache.shape[:-1], dtype=jnp.float32))
    arguments = cache, cache, of(B, 1, H, D), of(B, 1, G, D), of(dtype=jnp.int32)
    step, donated = _decode_step, (0, 1)
  elif program == "experts":
    K, N = H * D, 4 * H * D
    arguments = of(length, K), of(EXPERTS, K, N), of(EXPERTS, dtype=jnp.int32), of(length, N)
    step, donated = _grouped_with_grads, ()
  else:
    rows = of(B, length, dtype=jnp.int32)
    cotangents = of(B, length, H, D), of(B, length, H, dtype=jnp.float32)
    key = of(B, length, G, D)
    arguments = of(B, length, H, D), key, key, KeyIntervals(rows, rows), cotangents
    step, donated = functools.partial(_with_grads, program), ()
  with jax.set_mesh(gpu_mesh):
    return jax.jit(step, donate_argnums=donated).lower(*arguments).compile()


def _with_grads(backend, query, key, value, intervals, cotangents):
  results, pull_back = jax.vjp(
    lambda *arrays: attention(*arrays, intervals, backend=backend), query, key, value
  )
  return results, pull_back(cotangents)


def _grouped_with_grads(x, weight, sizes, cotangent):
  result, pull_back = jax.vjp(
    lambda x, weight: grouped_matmul(x, weight, sizes, backend="triton"), x, weight
  )
  return result, pull_back(cotangent)


def _decode_step(key_cache, value_cache, query, new, position):
  intervals = KeyIntervals(*(jnp.full((B, 1), edge, jnp.int32) for edge in (0, position + 1)))
  new = quantize(new) if isinstance(key_cache, Quantized) else new

  def one_layer(caches, layer):
    caches = tuple(write(cache, new, layer, position) for cache in caches)
    return caches, decode_attention(query, *caches, intervals, layer=layer, backend="triton")[0]

  return jax.lax.scan(one_layer, (key_cache, value_cache), jnp.arange(LAYERS))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("gpu")
  parser.add_argument(
    "program", choices=("triton", "mosaic_gpu", "decode", "decode_int8", "experts")
  )
  parser.add_argument("head_dim", type=int)
  parser.add_argument("dtype")
  parser.add_argument("length", type=int)
  flags = parser.parse_args()
  os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
  with tempfile.TemporaryDirectory() as folder:
    with printed_to(pathlib.Path(folder) / "assembler") as log:
      compiled = compile_program(
        flags.gpu, flags.program, D=flags.head_dim, dtype=flags.dtype, length=flags.length
      )
    spilled = re.findall(r"(\d+) bytes spill stores", log.read_text())
  memory = compiled.memory_analysis()
  made = dict(
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    temporary_bytes=memory.temp_size_in_bytes,
    spilled_bytes=[int(count) for count in spilled],
  )
  print(json.dumps(made))


@contextlib.contextmanager
def printed_to(path: pathlib.Path):
  """Sends what this process prints, C++ included, to a file."""
  sys.stdout.flush()
  kept = os.dup(1)
  with open(path, "w") as file:
    os.dup2(file.fileno(), 1)
    try:
      yield path
    finally:
      os.dup2(kept, 1)
      os.close(kept)


if __name__ == "__main__":
  main()
