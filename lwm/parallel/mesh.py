"""The device mesh of a stage."""

from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lwm.errors import ConfigError
from lwm.parallel.sharding import AXES, MeshConfig, ShardingRules


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with explicit axes (data, fsdp, ring, ulysses, tensor), nearest neighbours last.

  Over several slices of TPUs, `data` is the axis that crosses from one to the next: what it sums,
  once a step, goes over the data-centre network, and all else stays on the interconnect of a slice.

  Args:
    config: sizes; one may be -1.
    devices: all of the run's devices unless given.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, or another axis than `data`
      would cross slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = config.resolve(len(devices))
  shape = [sizes[axis] for axis in AXES]
  # On GPUs, JAX's slices are the hosts: their networks carry the other axes too.
  # Devices of an ahead-of-time topology of one slice do not name it.
  tpus = [device for device in devices if device.platform == "tpu"]
  slices = len({getattr(device, "slice_index", 0) for device in tpus})
  if slices > 1:
    _check_slices(sizes, slices)
    across = [slices if axis == ShardingRules.slices else 1 for axis in AXES]
    within = [size // count for size, count in zip(shape, across)]
    grid = mesh_utils.create_hybrid_device_mesh(
      within, across, devices, allow_split_physical_axes=True
    )
  else:
    # `jax.make_mesh` has no place for tensor=16 on a torus of 8 x 8 x 4: it splits no axis of it.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _check_slices(sizes: Mapping[str, int], slices: int) -> None:
  across = ShardingRules.slices
  if sizes[across] % slices == 0:
    return
  others = [f"mesh.{axis}={sizes[axis]}" for axis in AXES if axis != across and sizes[axis] > 1]
  raise ConfigError(
    f"mesh.{across}={sizes[across]} is no multiple of the {slices} slices, so "
    f"{' x '.join(others)} would cross from one to the next: only {across} may. Set "
    f"mesh.{across} to a multiple of {slices}."
  )
