"""What a device could do at most: the denominator of MFU."""

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets (no sparsity). The key is a
# part of `jax.Device.device_kind` in lower case; the first that fits counts, so the longer first.
PEAK_FLOPS = {
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,  # v5p calls itself "TPU v5" or "TPU v5p".
    "tpu v6": 918e12,
    "tpu7x": 1153.5e12,  # A chip of 2307e12 shows as two devices.
    "tpu v7x": 1153.5e12,
    "a100": 312e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "h200": 989e12,
    "b200": 2250e12,
}


def peak_flops(device: jax.Device, compute_dtype: str) -> float | None:
  """Peak FLOP/s of one device, or None if its kind is not in the table.

  An accelerator is held against its bfloat16 peak, whatever the run computes in. No data sheet
  gives a CPU's, so it is measured: the best of a few large matrix products in `compute_dtype` on
  the whole machine, shared equally among its (virtual) devices.
  """
  if device.platform == "cpu":
    return measured_flops(device, compute_dtype) / jax.local_device_count()
  kind = device.device_kind.lower()
  return next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)


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
