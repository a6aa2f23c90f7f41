"""What a device could do at most: the denominator of MFU."""

import time

import jax
import jax.numpy as jnp

from lwm.cost.chips import of_kind


def peak_flops(device: jax.Device, compute_dtype: str) -> float | None:
  """Peak FLOP/s of one device, or None if lwm/cost/chips.py does not have it.

  An accelerator is held against its bfloat16 peak, whatever the run computes in. No data sheet
  gives a CPU's, so it is measured: the best of a few large matrix products in `compute_dtype` on
  the whole machine, shared equally among its (virtual) devices.
  """
  if device.platform == "cpu":
    return measured_flops(device, compute_dtype) / jax.local_device_count()
  chip = of_kind(device.device_kind)
  return chip and chip.flops


def measured_flops(device: jax.Device, compute_dtype: str, size: int = 2048) -> float:
  """FLOP/s of the best of four size x size matrix products on `device`."""
  matrix = jax.device_put(jnp.ones((size, size), compute_dtype), device)
  multiply = jax.jit(jnp.matmul)
  jax.block_until_ready(multiply(matrix, matrix))
  best = float("inf")
  for _ in range(4):
    start = time.perf_counter()
    jax.block_until_ready(multiply(matrix, matrix))
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best
