"""Compares the grouped product's backends with `jax.lax.ragged_dot`, and tokamax's if installed."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.benchmarks.timing import failure, seconds
from kernels.experts import api, grouped_matmul


@dataclasses.dataclass(frozen=True)
class Groups:
  """Rows sorted by expert, times one matrix per expert. Loads are uneven, and one is 0."""

  rows: int
  inputs: int
  outputs: int
  experts: int
  dtype: str

  def sizes(self) -> jax.Array:
    """Rows of each expert, int32; they fall from the first expert to the last."""
    weight_E = np.arange(self.experts)[::-1]
    sizes_E = self.rows * weight_E // weight_E.sum()
    sizes_E[0] += self.rows - sizes_E.sum()
    return jnp.asarray(sizes_E, jnp.int32)


def groups(platform: str) -> tuple[Groups, ...]:
  """What to measure: the experts of one device in DeepSeekMoE 16B, on CPUs at a fraction of it."""
  if platform == "cpu":
    return (Groups(2048, 256, 352, 8, "float32"),)
  return (Groups(16384, 2048, 1408, 8, "bfloat16"),)


def measure_grouped(case: Groups) -> list[dict]:
  """One record per backend: milliseconds, TFLOP/s and speed as a ratio to `ragged_dot`.

  `backward` has the forward pass and the gradients of rows and weights. A backend that supports the
  arguments but fails has `error` instead.
  """
  random = np.random.default_rng(0)
  x_RxK = jnp.asarray(random.standard_normal((case.rows, case.inputs)), case.dtype)
  shape = case.experts, case.inputs, case.outputs
  weight_ExKxN = jnp.asarray(random.standard_normal(shape), case.dtype)
  sizes_E = case.sizes()
  flops = 2 * case.rows * case.inputs * case.outputs

  def run(product: Callable) -> dict[str, float]:
    def forward(x_RxK, weight_ExKxN):
      return product(x_RxK, weight_ExKxN, sizes_E)

    def backward(x_RxK, weight_ExKxN):
      out_RxN, transpose = jax.vjp(forward, x_RxK, weight_ExKxN)
      return transpose(out_RxN)

    return {"forward": seconds(forward, *arrays), "backward": seconds(backward, *arrays)}

  arrays = x_RxK, weight_ExKxN
  products = {
    backend.name: functools.partial(grouped_matmul, backend=backend)
    for backend in api.BACKENDS
    if backend.unsupported(*arrays) is None
  }
  if importlib.util.find_spec("tokamax"):
    products["tokamax"] = importlib.import_module("tokamax").ragged_dot
  peer = run(products["ragged_dot"])
  records: list[dict] = []
  for name, product in products.items():
    try:
      taken = peer if name == "ragged_dot" else run(product)
    except Exception as error:
      # A backend may raise anything, also out of memory; the others are still measured.
      records.append({"backend": name, "error": failure(error)})
      continue
    record = {"backend": name, **dataclasses.asdict(case)}
    for direction, work in (("forward", flops), ("backward", 3 * flops)):
      record |= {
        f"{direction}_ms": taken[direction] * 1e3,
        f"{direction}_teraflops": work / taken[direction] / 1e12,
        f"{direction}_speed_ratio": peer[direction] / taken[direction],
      }
    records.append(record)
  return records
