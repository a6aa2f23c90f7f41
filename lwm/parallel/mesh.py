"""The device mesh of a stage, and whether a model fits it."""

from collections.abc import Mapping
from collections.abc import Sequence
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import Mesh

from lwm.experiment import ConfigError
from lwm.experiment import MeshConfig
from lwm.model.config import ModelConfig
from lwm.parallel.sharding import ShardingRules

AXES = ("data", "fsdp", "ring", "ulysses", "tensor")

# Of the model's settings, the dimension that each one is.
_DIMENSIONS = {
    "width": "model",
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "feed_forward_width": "feed_forward",
    "vocab_size": "vocab",
}


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
    across = [slices, 1, 1, 1, 1]
    within = [size // count for size, count in zip(shape, across)]
    grid = mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )
  else:
    # `jax.make_mesh` has no place for tensor=16 on a torus of 8 x 8 x 4: it splits no axis of it.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _check_slices(sizes: Mapping[str, int], slices: int) -> None:
  if sizes["data"] % slices == 0:
    return
  others = [f"mesh.{axis}={sizes[axis]}" for axis in AXES if axis != "data" and sizes[axis] > 1]
  raise ConfigError(
      f"mesh.data={sizes['data']} is no multiple of the {slices} slices, so {' x '.join(others)} "
      f"would cross from one to the next: only data may. Set mesh.data to a multiple of {slices}."
  )


def check_model_fits_mesh(
    model: ModelConfig, sizes: Mapping[str, int], rules: ShardingRules = ShardingRules()
) -> None:
  """Raises ConfigError, naming setting and axis, if a dimension does not divide its mesh axis.

  Args:
    model: the decoder.
    sizes: devices along each mesh axis (`MeshConfig.resolve` or `Mesh.shape`).
    rules: which axis carries which dimension.
  """
  for setting, logical_axis in _DIMENSIONS.items():
    axes = getattr(rules, logical_axis) or ()
    axes = (axes,) if isinstance(axes, str) else axes
    size = getattr(model, setting)
    if size % math.prod(sizes[axis] for axis in axes) == 0:
      continue
    name = f"config.model.{setting}"
    if setting == "vocab_size":
      name = "config.model.text_vocab_size + vision_vocab_size"
    raise ConfigError(
        f"{name} = {size} does not divide over mesh.{' x '.join(axes)} = "
        f"{' x '.join(str(sizes[axis]) for axis in axes)}: change one of them."
    )
  if rules.sequence is None:
    return
  # Key/value heads are repeated where there are too few of them.
  ulysses = rules.sequence[1]
  if model.num_heads % (sizes[rules.heads] * sizes[ulysses]):
    raise ConfigError(
        f"config.model.num_heads = {model.num_heads} does not divide over mesh.{rules.heads} x "
        f"{ulysses} = {sizes[rules.heads]} x {sizes[ulysses]}: change one of them, or use a larger "
        f"mesh.{rules.sequence[0]} instead."
    )
