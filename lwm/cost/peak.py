"""Peak FLOP/s of a device: the denominator of MFU."""

import functools
import time

import jax
import jax.numpy as jnp

from lwm.cost.chips import of_kind


def peak_flops(device: jax.Device, compute_dtype: str) -> float | None:
  """Peak FLOP/s of one device, or None if lwm/cost/chips.py has no entry for it.

  For an accelerator this is its bfloat16 peak, whatever the compute dtype. No data sheet gives the
  peak of a CPU, so it is measured: the best of a few large matrix products in `compute_dtype` on
  the whole machine, divided equally among its (virtual) devices.
  """
  if device.platform == "cpu":
    return measured_flops(jax.local_devices()[0], compute_dtype) / jax.local_device_count()
  chip = of_kind(device.device_kind)
  return chip.flops if chip else None


@functools.cache
def measured_flops(device: jax.Device, compute_dtype: str, size: int = 1024) -> float:
  """FLOP/s of the best of four size x size matrix products on `device`, measured once."""
  matrix = jax.device_put(jnp.ones((size, size), compute_dtype), device)
  multiply = jax.jit(jnp.matmul)
  jax.block_until_ready(multiply(matrix, matrix))
  best = float("inf")
  for _ in range(4):
    start = time.perf_counter()
    jax.block_until_ready(multiply(matrix, matrix))
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best
