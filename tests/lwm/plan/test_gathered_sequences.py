"""No device ever holds a whole sequence of activations."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from configs import lwm_text_7b
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.plan import load, plan_stage
from lwm.plan.compilation import compile_ahead
from tests.lwm.plan import planned
from tests.lwm.plan.gathered_sequences import crossed_axes, gathered_sequences

# Enough layers to make a weight of all layers larger than one head of the whole sequence.
LAYERS, LENGTH, WIDTH = 32, 4096, 128
PARAMETERS = [(LAYERS, WIDTH, 256)]


@pytest.mark.slow
def test_the_7b_step_at_1m_tokens_gathers_no_sequence():
  experiment = lwm_text_7b.get_config()
  stage = experiment.stages[-1]
  stage.mesh = MeshConfig(fsdp=4, ring=4, ulysses=4, tensor=4)
  assert stage.sequence_length == 2**20 and experiment.model.num_layers == 32
  plan, program, compilation = plan_stage(experiment, stage, load("v4:8x8x4"))
  assert not gathered_sequences(
    compilation.text,
    plan.mesh,
    sequence_length=stage.sequence_length,
    width=experiment.model.width,
    num_layers=experiment.model.num_layers,
    parameters=[leaf.shape for leaf in jax.tree.leaves(program.state.params)],
  )
  # The program has all-gathers that could have been found.
  assert compilation.text.count(" all-gather") > 5
  assert plan.compile_seconds < 600
  assert plan.peak_rss < 16e9


@pytest.mark.slow
def test_memory_of_a_shard_does_not_grow_with_the_ring():
  """Rings of 4 and of 16 with equal tokens per device: nothing is kept from every hop."""
  temporaries = []
  for machine, ring in (("v5p:2x2x1", 4), ("v5p:2x2x4", 16)):
    experiment = planned.get_config()
    stage = experiment.stages[0]
    stage.mesh = MeshConfig(fsdp=1, ring=ring)
    stage.sequence_length = stage.tokens_per_batch = 4096 * ring
    temporaries.append(plan_stage(experiment, stage, load(machine))[0].memory.temporaries)
  small, large = temporaries
  assert large < 1.1 * small


def whole_by_hand(x_SxM, weight):
  del weight
  gather = functools.partial(jax.lax.all_gather, axis_name="ring", tiled=True)
  return jax.shard_map(gather, in_specs=P("ring"), out_specs=P(None), check_vma=False)(x_SxM)


def whole_by_partitioner(x_SxM, weight):
  del weight
  return jax.reshard(x_SxM, P(None))


def a_head_at_a_time(x_SxM, weight):
  """Half of the width at the whole length: fewer elements than the residual stream has."""
  del weight
  return jax.reshard(x_SxM[:, : WIDTH // 2], P(None))


def sum_of_padded_parts(x_SxM, weight):
  """The form that XLA sometimes gives an all-gather."""
  del weight

  def local(x_SxM):
    whole_SxM = jnp.zeros((LENGTH, WIDTH // 2))
    start = jax.lax.axis_index("ring") * x_SxM.shape[0]
    return jax.lax.psum(
      jax.lax.dynamic_update_slice(whole_SxM, x_SxM[:, : WIDTH // 2], (start, 0)), "ring"
    )

  return jax.shard_map(local, in_specs=P("ring"), out_specs=P(None), check_vma=False)(x_SxM)


def gradient_of_weights(x_SxM, weight):
  """A sum over the tokens, which is not a part of the sequence."""
  return jax.grad(lambda weight: jnp.sum((x_SxM @ jax.reshard(weight, P(None))) ** 2))(weight)


def stacked_by_layers(x_SxM, weight):
  del weight
  return jax.reshard(jnp.stack([x_SxM] * LAYERS), P(None))


def weights_for_use(x_SxM, weight):
  return x_SxM @ jax.reshard(weight, P(None))


def integers(x_SxM, weight):
  del weight
  return jax.reshard((x_SxM[:, 0] > 0).astype(jnp.int32), P(None))


def neighbours_along_tensor(x_SxM, weight):
  del weight
  return jax.reshard(jax.reshard(x_SxM, P(("ring", "tensor"))) + 1, P("ring"))


@pytest.mark.parametrize(
  "program, caught",
  [
    (whole_by_hand, True),
    (whole_by_partitioner, True),
    (a_head_at_a_time, True),
    (sum_of_padded_parts, True),
    (stacked_by_layers, True),
    (weights_for_use, False),
    (gradient_of_weights, False),
    (integers, False),
    (neighbours_along_tensor, False),
  ],
)
def test_what_counts(program, caught):
  mesh = make_mesh(MeshConfig(fsdp=1, ring=4, tensor=2), jax.devices("cpu")[:8])
  with jax.set_mesh(mesh):
    arguments = [
      jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, P("ring")))
      for shape in ((LENGTH, WIDTH), (WIDTH, 256))
    ]
    lowered = jax.jit(program).lower(*arguments)
  found = gathered_sequences(
    compile_ahead(lowered, "cpu").text,
    dict(mesh.shape),
    sequence_length=LENGTH,
    width=WIDTH,
    num_layers=LAYERS,
    parameters=PARAMETERS,
  )
  assert bool(found) == caught, found


@pytest.mark.parametrize("name, caught", [("all-reduce-scatter.1", False), ("fused", True)])
def test_a_sum_of_which_a_device_keeps_its_part_is_no_gather(name, caught):
  text = f"""
%{name} (input: f32[4000,128]) -> f32[1024,128] {{
  %input = f32[4000,128] parameter(0)
  %pad.1 = f32[4096,128] pad(%input, %zero), padding=0_96x0_0
  %all-reduce.1 = f32[4096,128] all-reduce(%pad.1), replica_groups={{{{0,1,2,3}}}}
  ROOT %dynamic-slice.1 = f32[1024,128] dynamic-slice(%all-reduce.1, %start, %zero)
}}

%other (x: f32[8]) -> f32[8] {{
  ROOT %all-reduce.2 = f32[8] all-reduce(%x), replica_groups={{{{0,1,2,3}}}}
}}
"""
  found = gathered_sequences(
    text, {"ring": 4}, sequence_length=1024, width=1024, num_layers=1, parameters=[]
  )
  assert bool(found) == caught, found


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("{{0,1},{2,3},{4,5},{6,7}}", ["tensor"]),
    ("{{0,2,4,6},{1,3,5,7}}", ["ring"]),
    ("[4,2]<=[8]", ["tensor"]),
    ("[2,4]<=[4,2]T(1,0)", ["ring"]),
    ("[1,8]<=[8]", ["ring", "tensor"]),
    ("mesh['data'=1,'ring'=4,'tensor'=2] {'ring'}", ["ring"]),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ["tensor"]),
    ("{}", ["ring", "tensor"]),
  ],
)
def test_axes_of_replica_groups(groups, axes):
  line = f"%g = f32[8] all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"
  assert crossed_axes(line, {"data": 1, "ring": 4, "tensor": 2}) == axes
