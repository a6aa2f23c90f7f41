"""Compiles attention, forward and backward, for an H200 by XLA on a machine without a GPU.

  python -m tests.kernels.compile_for_gpu BACKEND HEAD_DIM DTYPE

Prints bytes of temporaries, of the scores if they were materialised, and of registers spilled by
each Mosaic GPU kernel (a thread), as JSON. Needs JAX's CUDA plugin, and a ptxas that knows the PTX
version of Triton: the one inside the Triton package is put first.
"""

import contextlib
import importlib
import json
import os
import pathlib
import re
import sys
import tempfile

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from kernels.attention import backend as backend_lib
from kernels.attention.intervals import KeyIntervals

# After openxla/xla, xla/backends/gpu/target_config/specs/h200.txtpb.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
SHAPE = dict(B=1, S=8192, H=8, G=2)


def h200() -> jax.sharding.Mesh:
  """A mesh of one H200 that is not there."""
  jax.devices()  # Loads the plugin.
  topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
  return jax.sharding.Mesh(topology.devices, ("data",))


def compile_attention(backend, *, D: int, dtype: jnp.dtype):
  """The compiled step: values and gradients of one attention, causal or any other intervals."""
  B, S, H, G = SHAPE.values()

  def step(query, key, value, start, stop, cotangents):
    def function(*arrays):
      intervals = KeyIntervals(start, stop)
      return backend_lib.differentiable(backend, D**-0.5, None, *arrays, intervals)

    results, pull_back = jax.vjp(function, query, key, value)
    return results, pull_back(cotangents)

  mesh = h200()
  sharding = jax.NamedSharding(mesh, jax.P())

  def of(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  rows = of(B, S, dtype=jnp.int32)
  cotangents = of(B, S, H, D), of(B, S, H, dtype=jnp.float32)
  with jax.set_mesh(mesh):
    arguments = of(B, S, H, D), of(B, S, G, D), of(B, S, G, D), rows, rows, cotangents
    return jax.jit(step).lower(*arguments).compile()


def main() -> None:
  name, head_dim, dtype = sys.argv[1:]
  os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
  with tempfile.TemporaryDirectory() as folder:
    triton = pathlib.Path(importlib.util.find_spec("triton").origin).parent
    assembler = triton / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    (pathlib.Path(folder) / "ptxas").symlink_to(assembler)
    os.environ["PATH"] = folder + os.pathsep + os.environ["PATH"]
    module = importlib.import_module(f"kernels.attention.{name}")
    with printed_to(pathlib.Path(folder) / "assembler") as log:
      compiled = compile_attention(
          getattr(module, name.upper()), D=int(head_dim), dtype=jnp.dtype(dtype)
      )
    spilled = re.findall(r"(\d+) bytes spill stores", log.read_text())
  made = dict(
      temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
      scores_bytes=4 * SHAPE["B"] * SHAPE["H"] * SHAPE["S"] ** 2,
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
