"""LWM's recipes on LWM's chips."""

import pytest

from configs import lwm_text_7b, lwm_vision_7b
from lwm.parallel.mesh import make_mesh
from lwm.plan import load


@pytest.mark.parametrize(
  "config, topology", ((lwm_text_7b, "v4:8x8x4"), (lwm_vision_7b, "v4:8x8x8"))
)
def test_every_stage_has_a_mesh_on_the_torus(config, topology):
  """No whole axis of a torus of 8 x 8 x 4 has 16 devices for `tensor`: axes are split."""
  devices = load(topology).devices
  for stage in config.get_config().stages:
    mesh = make_mesh(stage.mesh, devices)
    assert dict(mesh.shape) == stage.mesh.resolve(len(devices))
    assert len(set(mesh.devices.flat)) == len(devices)
