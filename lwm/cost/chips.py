"""Peak rates and memory of accelerators: the one table that MFU and plans use.

Peaks come from the makers (Google Cloud's system architecture pages, NVIDIA's data sheets), for
dense matrices. Each figure is for one JAX device. That is one chip, except that a TPU7x chip is two
devices.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device.

  Attributes:
    name: as in `--topology=NAME:...`.
    kinds: lower-case parts of `jax.Device.device_kind` that identify the device.
    flops: bfloat16 FLOP/s.
    memory: bytes. On TPUs, what XLA grants a program; on GPUs, all of it, although JAX gets only a
      part (lwm/parallel/xla_flags.py).
    memory_bandwidth: bytes/s.
    link_bandwidth: bytes/s one way, over a link to one neighbour in the torus (TPU) or from the
      device to all others in its host (GPU).
    network_bandwidth: bytes/s one way, the device's share of the network between hosts (GPU) or
      slices (TPU).
    host_bandwidth: bytes/s one way to the host's memory.
    host_memory: bytes, the device's share of the host's memory on Google Cloud's machines.
    devices_per_chip: number of JAX devices per chip.
  """

  name: str
  kinds: tuple[str, ...]
  flops: float
  memory: int
  memory_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float
  host_bandwidth: float
  host_memory: float
  devices_per_chip: int = 1

  @property
  def is_tpu(self) -> bool:
    return self.name.startswith(("v", "tpu"))


# The first entry that matches a device counts, so longer kinds come first. The memory of a TPU is
# what libtpu 0.0.48 reports as available when a program needs too much.
CHIPS = (
  Chip("v4", ("tpu v4",), 275e12, int(30.75 * GIB), 1.2e12, 45e9, 6e9, 8e9, 101e9),
  Chip("v5e", ("tpu v5 lite", "tpu v5e"), 197e12, int(15.75 * GIB), 0.82e12, 45e9, 3e9, 8e9, 48e9),
  # Its device kind is "TPU v5" or "TPU v5p".
  Chip("v5p", ("tpu v5",), 459e12, int(95.73 * GIB), 2.765e12, 90e9, 6e9, 16e9, 112e9),
  Chip("v6e", ("tpu v6",), 918e12, int(31.24 * GIB), 1.64e12, 90e9, 12e9, 16e9, 180e9),
  Chip(
    "tpu7x", ("tpu7x", "tpu v7x"), 1153.5e12, int(94.74 * GIB), 3.69e12, 90e9, 6e9, 16e9, 120e9, 2
  ),
  Chip("a100", ("a100",), 312e12, 85_100_068_864, 2.04e12, 300e9, 25e9, 32e9, 170e9),
  Chip("h100-pcie", ("h100 pcie",), 756e12, 85_100_068_864, 2.04e12, 64e9, 50e9, 64e9, 170e9),
  Chip("h100", ("h100",), 989e12, 84_942_979_072, 3.35e12, 450e9, 50e9, 64e9, 234e9),
  Chip("h200", ("h200",), 989e12, 151_397_597_184, 4.8e12, 450e9, 50e9, 64e9, 369e9),
  Chip("b200", ("b200",), 2250e12, 191_514_411_008, 7.67e12, 900e9, 50e9, 64e9, 496e9),
)


def of_kind(device_kind: str) -> Chip | None:
  """The entry for a `jax.Device.device_kind`, or None."""
  kind = device_kind.lower()
  return next((chip for chip in CHIPS if any(part in kind for part in chip.kinds)), None)
