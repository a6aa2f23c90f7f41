"""The device mesh of a stage."""

from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lwm.errors import ConfigError
from lwm.parallel.sharding import AXES, MeshConfig, ShardingRules


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the explicit axes AXES; neighbours along the last axis are nearest.

  Over several TPU slices, only `ShardingRules.slices` crosses from one slice to the next: its sums,
  taken once per step, use the data-centre network, and all other traffic stays on the interconnect
  of a slice.

  Args:
    config: sizes; one may be -1.
    devices: default: all devices of the run.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, or an axis other than
      `ShardingRules.slices` would cross slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = config.resolve(len(devices))
  shape = [sizes[axis] for axis in AXES]
  # JAX also numbers the hosts of GPUs as slices, but their network can carry every axis. Devices of
  # an ahead-of-time topology with one slice have no slice_index.
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
    # `jax.make_mesh` never splits a physical axis, so an axis of 16 would not fit a torus of
    # 8 x 8 x 4.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _check_slices(sizes: Mapping[str, int], slices: int) -> None:
  across = ShardingRules.slices
  if sizes[across] % slices == 0:
    return
  others = [f"mesh.{axis}={sizes[axis]}" for axis in AXES if axis != across and sizes[axis] > 1]
  raise ConfigError(
    f"mesh.{across}={sizes[across]} is not a multiple of the {slices} slices, so "
    f"{' x '.join(others)} would cross slices, which only {across} may: set mesh.{across} to a "
    f"multiple of {slices}."
  )
