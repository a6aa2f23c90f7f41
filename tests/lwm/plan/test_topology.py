import pytest

from lwm.errors import UserError
from lwm.plan import topology


@pytest.mark.parametrize(
  "name, devices, chip, memory",
  [
    # One device per chip; libtpu's default for v4 is two.
    ("v4:4x4x4", 64, "v4", 30.75),
    ("v5e:4x4", 16, "v5e", 15.75),
    ("v5p:2x2x1", 4, "v5p", 95.73),
    ("v6e:2x2", 4, "v6e", 31.24),
    # Two devices per chip.
    ("tpu7x:2x2x1", 8, "tpu7x", 94.74),
  ],
)
def test_slices(name, devices, chip, memory):
  slice_ = topology.load(name)
  assert len(slice_.devices) == devices
  assert slice_.chip.name == chip
  assert slice_.chip.memory == int(memory * 2**30)
  assert len(slice_.torus) == name.count("x", name.index(":")) + 1


def test_cpu_devices():
  assert len(topology.load("cpu:4").devices) == 4


@pytest.mark.parametrize(
  "name, message",
  [
    ("v5p:8x8", "no such machine"),
    ("v9:2x2x2", "no such machine"),
    ("v5e", "no such machine"),
    ("v5e:1x1", "libtpu knows no such slice"),
    ("v5e:3x3", "Google has no such slice"),
    # libtpu would compile for these slices, which Google does not offer.
    ("v5e:32x32", "Google has no such slice"),
    ("v5p:6x6x6", "Google has no such slice"),
    ("h100:0x8", "no such machine"),
    ("cpu:0", "no such machine"),
    ("cpu:9", "xla_force_host_platform_device_count=9"),
  ],
)
def test_unknown_machines(name, message):
  with pytest.raises(UserError, match=message) as error:
    topology.load(name)
  assert f"--topology={name}: " in str(error.value)
