"""Shows how well the blocks of a kernel are scheduled on a TPU, without a TPU.

    python -m experiments.tpu_schedule --kernel=forward --device=v5p --rows=1024 --keys=512
    python -m experiments.tpu_schedule --kernel=grouped_matmul --inputs=2048 --outputs=1408

compiles the kernel with libtpu and reads the instruction bundles (one per cycle, if nothing stalls)
of its loop bodies. It prints the number of bundles and the share of each unit's slots that they
use. Attention has two bodies: for full blocks, and for blocks with a mask. The sizes in
`kernels/attention/pallas_tpu/block_sizes.py` were chosen with it.

`--kernel=decode` has eight key/value heads, so that its blocks have eight rows per position.
`grouped_matmul` and `grouped_outer`, the products of experts, choose their blocks themselves. If a
body is so large that the compiler makes loops of its parts, it is not counted as a whole, and its
bundles do not grow with the block.
"""

import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies

from kernels.attention.pallas_tpu import backward, forward
from kernels.attention.pallas_tpu.tiles import Tiling
from kernels.decode.cache import Quantized
from kernels.decode.pallas_tpu import kernel as decode_kernel
from kernels.decode.pallas_tpu.layouts import Rows
from kernels.experts.pallas_tpu import kernel as experts_kernel

_GROUPED = ("grouped_matmul", "grouped_outer")
_KERNELS = ("forward", "query_grad", "key_grads", "decode", *_GROUPED)
_TOPOLOGIES = {
  "v4": "v4:2x2x1",
  "v5e": "v5e:2x2",
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:2x2",
  "tpu7x": "tpu7x:2x2x1",
}

_KERNEL = flags.DEFINE_enum("kernel", "forward", _KERNELS, "The kernel to compile.")
_DEVICE = flags.DEFINE_enum("device", "v5p", list(_TOPOLOGIES), "The TPU to compile for.")
_ROWS = flags.DEFINE_integer("rows", 1024, "Queries x heads per tile.", lower_bound=16)
_KEYS = flags.DEFINE_integer("keys", 512, "Positions per block.", lower_bound=128)
_HEAD_DIM = flags.DEFINE_enum("head_dim", "128", ["64", "128", "256"], "Width of a head.")
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "bfloat16",
  ["bfloat16", "float32", "int8"],
  "Dtype of the operands; int8 is for the cache of --kernel=decode.",
)
_INPUTS = flags.DEFINE_integer("inputs", 2048, "Width of the rows of --kernel=grouped_*.")
_OUTPUTS = flags.DEFINE_integer("outputs", 1408, "Width of the products, or of the second rows.")
# Key/value heads of the cache of --kernel=decode; a block has positions x heads rows.
_DECODE_HEADS = 8

# The columns of the compiler's table, which has one row per bundle, and the columns to print.
_UNITS = "matrix cross_lane vector pop exponential load refill store spill scalar".split()  # noqa: SIM905
_PRINTED = ("matrix", "vector", "exponential", "load", "store")


def main(argv: Sequence[str]) -> None:
  del argv
  with tempfile.TemporaryDirectory() as directory:
    # libtpu reads this when it is loaded, at the first use below.
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
    jax.config.update("jax_platforms", "cpu")
    _compile(_TOPOLOGIES[_DEVICE.value])
    bodies = _loop_bodies(pathlib.Path(directory))
    if _KERNEL.value in _GROUPED:
      size = f"{_INPUTS.value} to {_OUTPUTS.value}"
      named = [(f"block of {experts_kernel.BLOCK_ROWS} rows", bodies[-1])]
    else:
      size = f"head_dim {_HEAD_DIM.value}"
      block = f"block of {_ROWS.value} rows x {_KEYS.value} keys"
      named = [(f"{name} {block}", body) for name, body in zip(("full", "masked"), bodies)]
    print(f"{_KERNEL.value} on {_DEVICE.value}, {size}, {_DTYPE.value}:")
    for name, (cycles, shares) in named:
      units = ", ".join(f"{unit} {shares[unit]:.0%}" for unit in _PRINTED)
      print(f"  {name}: {cycles} bundles; {units}")


def _compile(topology_name: str) -> None:
  """Compiles only the kernel, for the reports that the compiler writes."""
  device = topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices[0]
  if _DTYPE.value == "int8" and _KERNEL.value != "decode":
    raise app.UsageError("--dtype=int8 is for caches: use --kernel=decode, or --dtype=bfloat16.")
  mesh = jax.sharding.Mesh([device], ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  with jax.set_mesh(mesh):
    function, operands = (_grouped if _KERNEL.value in _GROUPED else _attention)(array)
    jax.jit(function).lower(*operands).compile()


def _grouped(array: Callable) -> tuple[Callable, list]:
  """The product, or the gradient of the weights, of two groups with some blocks of rows."""
  K, N, R = _INPUTS.value, _OUTPUTS.value, 4 * experts_kernel.BLOCK_ROWS
  x, sizes = array((R, K), _DTYPE.value), array((2,), jnp.int32)
  if _KERNEL.value == "grouped_outer":
    return experts_kernel.outer, [x, array((R, N), _DTYPE.value), sizes]
  function = functools.partial(experts_kernel.product, transposed=False)
  return function, [x, array((2, K, N), _DTYPE.value), sizes]


def _attention(array: Callable) -> tuple[Callable, list]:
  R, k, D, dtype = _ROWS.value, _KEYS.value, int(_HEAD_DIM.value), _DTYPE.value
  function: Callable
  options: dict[str, Any] = dict(scale=D**-0.5, soft_cap=None)
  if _KERNEL.value == "decode":
    function, operands = decode_kernel.partial, _decode_operands(array, R, k, D, dtype)
    options |= dict(layout=Rows(_DECODE_HEADS, D), positions=k, length=8 * k)
  else:
    query, key = array((1, 8, R, D), dtype), array((1, 8, k, D), dtype)
    cotangent = [query, array((1, 8, 2, R), jnp.float32)]
    tables = [array((1, 8, 2, R), jnp.int32), array((1, 1, 32), jnp.int32)]
    options |= dict(tiling=Tiling(8 * R, 8 * k, 1, 1, heads=1, queries=R, keys=k, cores=1))
    if _KERNEL.value == "forward":
      function, operands = forward.forward, [query, key, key, *tables]
      options |= dict(out_dtype=dtype)
    else:
      function = getattr(backward, _KERNEL.value)
      operands = [backward.Operands(query, key, key, *cotangent, *tables)]
  return functools.partial(function, **options), operands


def _decode_operands(array: Callable, R: int, k: int, D: int, dtype: str) -> list:
  """One batch row and a cache of eight blocks of k positions."""
  cache = array((1, 1, 8 * k * _DECODE_HEADS, D), dtype)
  if dtype == "int8":
    cache = Quantized(cache, array((1, 1, _DECODE_HEADS, 8 * k), jnp.float32))
  query = array((1, R, D), "bfloat16" if dtype == "int8" else dtype)
  return [query, cache, cache, array((1, R, 3), jnp.int32), array((5,), jnp.int32)]


def _loop_bodies(directory: pathlib.Path) -> list[tuple[int, dict[str, float]]]:
  """The bundles and the used share of each unit's slots, for the two longest branch-free runs."""
  name = f"*{'' if _KERNEL.value in _GROUPED else 'attention_'}{_KERNEL.value}*"
  (bundles,) = (
    path for path in directory.glob(f"{name}-final_bundles.txt") if "analysis" not in path.name
  )
  (table,) = directory.glob(f"{name}-final_hlo-static-per-bundle-utilization.txt")
  head, body = table.read_text().split("== UTILIZATION:")
  capacity = [int(slots) for slots in head.splitlines()[-1].split()]
  use = [[int(slots) for slots in line.split()] for line in body.splitlines() if line.strip()]

  runs: list[list[list[int]]] = [[]]
  for line in bundles.read_text().splitlines():
    if bundle := re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w)?\s*:", line):
      runs[-1].append(use[int(bundle[1], 16)])
      if bundle[2] or "sbr.rel" in line:
        runs.append([])
  shares = []
  for run in sorted(sorted(runs, key=len)[-2:], key=len):
    total = [sum(column) / slots / len(run) for column, slots in zip(zip(*run), capacity)]
    shares.append((len(run), dict(zip(_UNITS, total))))
  return shares


if __name__ == "__main__":
  app.run(main)
