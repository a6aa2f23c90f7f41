"""Prefill and decode, compiled for machines that you don't have."""

import math

import jax
import pytest

from configs import models
from lwm.infer.ahead import lower
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.plan import compile_program, load
from lwm.plan.memory import shard_bytes

CONTEXT = 1 << 17


@pytest.mark.slow
@pytest.mark.parametrize("mesh", (dict(ring=4), dict(ring=2, tensor=2)), ids=str)
def test_no_device_holds_the_whole_cache_or_whole_weights(mesh):
  """Of a 7B model with three layers: what it has beside its shards does not grow with either."""
  config = models.lwm_7b()
  config.num_layers = 3
  topology = load("v5p:2x2x1")
  devices = make_mesh(MeshConfig(fsdp=1, **mesh), topology.devices)
  lowered = lower(config, devices, context=CONTEXT, chunk=2048)
  layer_of_keys = CONTEXT * config.width * 2
  cache = 2 * config.num_layers * layer_of_keys
  assert shard_bytes(lowered.cache) == pytest.approx(cache / 4, rel=1e-3)
  weights = sum(math.prod(leaf.shape) * 2 for leaf in jax.tree.leaves(lowered.params))
  assert shard_bytes(lowered.params) == pytest.approx(weights / 4, rel=1e-3)
  for program in (lowered.prefill, lowered.decode):
    memory, compilation = compile_program(program, topology, lowered.params)
    # The largest buffers are the device's own shards of keys and values.
    assert memory.buffers[0].bytes == cache / 2 / 4
    # Heads are divided over `tensor`, and positions over the ring.
    shapes = compilation.text.count(f"[{config.num_layers},1,{CONTEXT // mesh['ring']}")
    assert shapes and f",{CONTEXT}," not in compilation.text
    # In decode, not even one layer of keys, nor the weights of a layer, is held beside the shards.
    bound = layer_of_keys if program is lowered.prefill else 2e8
    assert memory.temporaries < bound
