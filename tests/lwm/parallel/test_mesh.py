"""Meshes, which models fit on them, and where parameters are stored."""

import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, PartitionSpec as P

from lwm.config.validate import check_model_fits_mesh
from lwm.errors import ConfigError
from lwm.model import ModelConfig, build
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import AXES, MeshConfig

# The axes over which a parameter's width is divided.
STORED = ("fsdp", "expert", "ring", "ulysses")
ONES = dict.fromkeys(AXES, 1)


def test_axes_are_explicit_and_tensor_is_nearest():
  mesh = make_mesh(MeshConfig(data=2, fsdp=-1, ring=1, tensor=2))
  assert dict(mesh.shape) == ONES | {"data": 2, "fsdp": 2, "tensor": 2}
  assert set(mesh.axis_types) == {AxisType.Explicit}
  assert [d.id for d in mesh.devices[0, 0, 0, 0, 0]] == [0, 1]


def test_sizes_must_use_the_devices():
  with pytest.raises(ConfigError, match="does not divide the 8 devices"):
    make_mesh(MeshConfig(data=3))


def two_slices():
  """Two slices of 2 x 2 chips; this needs no TPU."""
  return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices


def test_data_crosses_slices_and_nothing_else_does():
  mesh = make_mesh(MeshConfig(data=4, fsdp=1, ring=2), two_slices())
  assert dict(mesh.shape) == ONES | {"data": 4, "ring": 2}
  slices_of_data = [{device.slice_index for device in row.flat} for row in mesh.devices]
  assert slices_of_data == [{0}, {0}, {1}, {1}]


def test_an_axis_that_would_cross_slices_is_named():
  message = (
    "mesh.data=1 is not a multiple of the 2 slices, so mesh.fsdp=4 x mesh.ring=2 would cross "
    "slices, which only data may: set mesh.data to a multiple of 2."
  )
  with pytest.raises(ConfigError, match=re.escape(message)):
    make_mesh(MeshConfig(fsdp=4, ring=2), two_slices())


@pytest.mark.parametrize(
  "sizes,changes,message",
  [
    (dict(tensor=4), {}, "config.model.num_kv_heads = 2 does not divide over mesh.tensor = 4"),
    (
      dict(fsdp=3, ring=2),
      {},
      "config.model.width = 64 does not divide over mesh.fsdp x expert x ring x ulysses = 3",
    ),
    (
      dict(tensor=2),
      dict(text_vocab_size=257, vocab_multiple=1),
      "config.model.vocab_multiple=1 = 257 does not divide over mesh.tensor = 2",
    ),
    (dict(tensor=2), dict(feed_forward_width=129), "config.model.feed_forward_width = 129"),
    (
      dict(tensor=2),
      dict(head_groups=2),
      "config.model.num_kv_heads = 2 / head_groups = 2 does not divide over mesh.tensor = 2",
    ),
    (dict(tensor=2), dict(num_heads=3, num_kv_heads=3), "config.model.num_heads = 3"),
    (
      dict(tensor=2, ulysses=4),
      {},
      "config.model.num_heads = 4 does not divide over mesh.tensor x ulysses = 2 x 4",
    ),
  ],
)
def test_what_does_not_fit_is_named(sizes, changes, message):
  check_model_fits_mesh(ModelConfig(), ONES | dict(fsdp=8, tensor=2))
  # Without a multiple, the tables are padded to what the meshes need.
  check_model_fits_mesh(ModelConfig(text_vocab_size=257), ONES | dict(tensor=2))
  with pytest.raises(ConfigError, match=re.escape(message)):
    check_model_fits_mesh(ModelConfig(**changes), ONES | sizes)


def test_lwm_7b_fits_the_meshes_of_the_paper():
  lwm = ModelConfig(
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    feed_forward_width=11008,
    text_vocab_size=32000,
    vision_vocab_size=8448,
  )
  for tensor in (4, 8, 16, 32):
    check_model_fits_mesh(lwm, ONES | dict(fsdp=64, ring=4, tensor=tensor))
  abstract = build(lwm).abstract()
  # The parameters of Llama-2-7B, and the rows and columns of the vision ids.
  expected = 6_738_415_616 + 2 * 8448 * 4096
  assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == expected


@pytest.mark.slow
def test_parameters_are_the_same_on_any_mesh_and_never_whole():
  model = build(ModelConfig(num_layers=1, width=16, feed_forward_width=32, text_vocab_size=32))
  drawn = []
  for sizes in (dict(fsdp=1), dict(fsdp=4, tensor=2)):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: sizes["fsdp"] * sizes.get("tensor", 1)])
    with jax.set_mesh(mesh):
      drawn.append(jax.jit(model.init)(jax.random.key(0)))
  jax.tree.map(np.testing.assert_array_equal, *drawn)
  blocks = drawn[1]["blocks"]
  assert blocks["attention"]["query"].sharding.spec == P(None, STORED, "tensor", None)
  assert blocks["attention"]["out"].sharding.spec == P(None, "tensor", None, STORED)
  assert blocks["feed_forward"]["down"].sharding.spec == P(None, "tensor", STORED)
  assert drawn[1]["embedding"].sharding.spec == P("tensor", STORED)
  assert drawn[1]["output"].sharding.spec == P(STORED, "tensor")
  assert drawn[1]["embedding"].addressable_shards[0].data.shape == (16, 4)
