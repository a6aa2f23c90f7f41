"""Memory of programs other than the train step, and reports of memory."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from lwm.cost.chips import GIB
from lwm.model import build
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules
from lwm.plan import compile_program, load, report
from lwm.plan.candidates import candidates
from lwm.plan.memory import Memory, shard_bytes
from tests.lwm.plan import planned

LENGTH = 1024


@pytest.mark.parametrize(
  "total, host, verdict",
  [
    (GIB, GIB, "1.0 GiB of 2.0 GiB: fits"),
    (3 * GIB, 0, "3.0 GiB of 2.0 GiB: OUT OF MEMORY by 1.0 GiB"),
    (GIB, 7 * GIB, "1.0 GiB of 2.0 GiB: OUT OF THE HOST'S MEMORY by 3.0 GiB"),
  ],
)
def test_both_memories_must_suffice(total, host, verdict):
  memory = Memory(
    parameters=0,
    optimizer=0,
    batch=0,
    gradients=0,
    temporaries=total,
    rest=0,
    total=total,
    host=host,
    capacity=2 * GIB,
    host_capacity=4 * GIB,
    buffers=(),
  )
  assert memory.fits == verdict.endswith("fits")
  assert report.verdict(types.SimpleNamespace(memory=memory)) == verdict


def test_the_closest_of_what_does_not_fit():
  def tried(total, host, remat):
    memory = Memory(
      parameters=0,
      optimizer=0,
      batch=0,
      gradients=0,
      temporaries=total,
      rest=0,
      total=total,
      host=host,
      capacity=2 * GIB,
      host_capacity=4 * GIB,
      buffers=(),
    )
    return types.SimpleNamespace(
      memory=memory, mesh={"ring": 4, "tensor": 1}, remat=remat, head_groups=1, moments="float32"
    )

  plans = [tried(9 * GIB, 0, "none"), tried(GIB, 30 * GIB, "offload"), tried(3 * GIB, 0, "full")]
  machine = types.SimpleNamespace(name="v5e:2x2", chip=None)
  sentence = report.nothing_fits(machine, "1m", plans, ())
  assert sentence.startswith(
    "1m: none of the programs tried fits v5e:2x2; the closest is ring 4, remat full, heads all, "
    "moments float32: 3.0 GiB of 2.0 GiB: OUT OF MEMORY by 1.0 GiB"
  )


def test_candidates_that_xla_refused_are_no_reason_for_a_larger_machine():
  experiment = planned.get_config()
  machine = load("v5e:2x2")
  sentence = report.nothing_fits(
    machine, "long", (), candidates(experiment, experiment.stages[0], 4)
  )
  assert sentence == (
    "long: XLA compiles none of the programs tried for v5e:2x2; try more with --tries."
  )


@pytest.mark.parametrize("new_tokens", (1, 256), ids=("decode", "prefill"))
def test_memory_of_sampling(new_tokens):
  machine = load("v5e:2x2")
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), machine.devices)
  rules = ShardingRules(sequence=None)
  model = build(planned.get_config().model, rules)

  def placed(tree, shardings):
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      tree,
      shardings,
    )

  params = placed(model.abstract(), rules.tree_shardings(model.logical_axes, mesh))
  with jax.set_mesh(mesh):
    cache = jax.eval_shape(functools.partial(model.init_cache, 2, LENGTH))
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec if leaf.sharding else rules.spec(), cache)
    cache = placed(cache, jax.tree.map(functools.partial(NamedSharding, mesh), specs))
    tokens = jax.ShapeDtypeStruct(
      (2, new_tokens), jnp.int32, sharding=NamedSharding(mesh, rules.spec("batch", None))
    )
    step = jax.jit(functools.partial(model.decode, rope_theta=1e4), donate_argnums=2)
    lowered = step.lower(params, tokens, cache)
  memory, compilation = compile_program(lowered, machine, params)
  assert memory.parameters == shard_bytes(params)
  assert memory.optimizer == memory.gradients == 0
  # Keys and values of half of the rows and half of the heads.
  config = model.config
  keys = 2 * config.num_layers * 1 * LENGTH * 1 * config.head_dim * 2
  assert keys <= shard_bytes(cache) <= memory.batch
  assert memory.total == memory.parameters + memory.batch + memory.temporaries + memory.rest
  assert memory.fits and compilation.buffers
