"""Machines by name: TPU slices and GPU clusters to compile for, which you don't need to have."""

import contextlib
import dataclasses
import importlib
import importlib.util
import logging
import os
import re

import jax
from jax.experimental import topologies

from lwm.cost.chips import Chip, of_kind
from lwm.cost.peak import measured_flops
from lwm.errors import UserError
from lwm.parallel.xla_flags import GPU_MEMORY
from lwm.plan.gpu_target import GPUS, gpu_target

# Dimensions of a slice.
_TPU_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
# Options for v4. Without them, libtpu shows each of a chip's two cores as a device.
_MEGACORE = dict(chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1), num_slices=1)
# Chips along each side of a whole pod of v5e or v6e.
_POD_SIDE = 16
# Rough memory bandwidth of a machine without accelerators; its FLOP/s are measured.
_CPU_BYTES_PER_SECOND = 20e9
_EXAMPLES = "v4:8x8x8, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, h100:4x8 (hosts x GPUs), cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices that programs can be compiled for.

  Attributes:
    name: as the user gave it.
    chip: what each device can do. Virtual CPU devices share equally what the CPU can do.
    devices: in JAX's order.
    devices_per_host: number of GPUs that share one host; None on TPU slices, whose network is a
      torus, and on CPUs.
    torus: number of chips along each dimension of a TPU slice; empty otherwise.
  """

  name: str
  chip: Chip
  devices: tuple[jax.Device, ...]
  devices_per_host: int | None = None
  torus: tuple[int, ...] = ()

  def goes_around(self, dimension: int) -> bool:
    """Whether a link joins both ends of a dimension of the torus.

    On v5e and v6e, only the sides of a whole pod have such links; on the others, all dimensions of
    slices that consist of cubes of 4 x 4 x 4 chips (Google Cloud's pages on TPU v5e and v5p).
    """
    if _TPU_DIMENSIONS[self.chip.name] == 2:
      return self.torus[dimension] == _POD_SIDE
    return all(side % 4 == 0 for side in self.torus)


def load(name: str) -> Topology:
  """The topology with this name: `v5p:8x8x8`, `h100:4x8`, `cpu:8`.

  Raises:
    UserError: the name is unknown, or the machine's compiler is not installed.
  """
  match = re.fullmatch(r"([a-z0-9]+):([1-9]\d*(?:x[1-9]\d*)*)", name)
  kind, sizes = (match[1], tuple(map(int, match[2].split("x")))) if match else (None, ())
  if kind in _TPU_DIMENSIONS and len(sizes) == _TPU_DIMENSIONS[kind]:
    return _tpu(name, kind, sizes)
  if kind in GPUS and len(sizes) == 2:
    return _gpu(name, kind, *sizes)
  if kind == "cpu" and len(sizes) == 1:
    return _cpu(name, *sizes)
  raise UserError(f"--topology={name}: no such machine; give one like {_EXAMPLES}.")


def _tpu(name: str, kind: str, sizes: tuple[int, ...]) -> Topology:
  # libtpu also compiles for slices that Google does not offer.
  fours = all(n in (1, 2) or n % 4 == 0 for n in sizes)
  if not fours or (len(sizes) == 2 and max(sizes) > _POD_SIDE):
    raise UserError(
      f"--topology={name}: Google has no such slice: give sides of 1, 2 or multiples of 4, and for "
      f"v5e and v6e at most {_POD_SIDE}."
    )
  # libtpu serves as a compiler only: it takes no lock on a TPU and asks no cloud metadata server.
  settings = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
  host = {"TPU_ACCELERATOR_TYPE": "v4-8", "TPU_WORKER_HOSTNAMES": "localhost"}
  for variable, value in (settings | host).items():
    os.environ.setdefault(variable, value)
  options = _MEGACORE if kind == "v4" else {}
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
  except Exception as error:
    if importlib.util.find_spec("libtpu") is None:
      raise UserError(
        f"--topology={name}: libtpu, the compiler for TPUs, is not installed: pip install libtpu."
      ) from error
    reason = str(error).splitlines()[0].rstrip(".")
    raise UserError(f"--topology={name}: libtpu knows no such slice: {reason}.") from error
  return Topology(name, _chip(devices[0]), tuple(devices), torus=sizes)


def _gpu(name: str, kind: str, hosts: int, gpus: int) -> Topology:
  # When the plugin is initialised a second time, or finds no NVIDIA driver, JAX logs a traceback
  # with this logger, which has no public name. A compiler needs neither, so the log says nothing.
  logger = logging.getLogger("jax._src.xla_bridge")
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  # Nor does it need CUDA's libraries, whose versions JAX would check unless JAX_PLATFORMS is cpu.
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  try:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      importlib.import_module("jax_plugins.xla_cuda13").initialize()
    devices = topologies.get_topology_desc(
      platform="cuda", topology=f"1x{hosts}x{gpus}", target_config=gpu_target(kind)
    ).devices
  except ImportError as error:
    raise UserError(
      f"--topology={name}: JAX's CUDA plugin, the compiler for GPUs, is not installed: "
      "pip install jax-cuda13-plugin jax-cuda13-pjrt."
    ) from error
  finally:
    logger.setLevel(level)
  chip = _chip(devices[0])
  chip = dataclasses.replace(chip, memory=int(GPU_MEMORY * chip.memory))
  return Topology(name, chip, tuple(devices), devices_per_host=gpus)


def _chip(device: jax.Device) -> Chip:
  chip = of_kind(device.device_kind)
  assert chip is not None
  return chip


def _cpu(name: str, count: int) -> Topology:
  if len(jax.devices("cpu")) < count:
    raise UserError(
      f"--topology={name}: JAX has {len(jax.devices('cpu'))} CPU devices; set "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
    )
  devices = tuple(jax.devices("cpu")[:count])
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // count
  bandwidth = _CPU_BYTES_PER_SECOND / count
  chip = Chip(
    name="cpu",
    kinds=(),
    flops=measured_flops(devices[0], "float32") / count,
    memory=memory,
    memory_bandwidth=bandwidth,
    link_bandwidth=bandwidth,
    network_bandwidth=bandwidth,
    host_bandwidth=bandwidth,
    host_memory=memory,
  )
  return Topology(name, chip, devices)
