"""Prefill and decode, traced and compiled for devices that you don't have."""

import math
import re

import jax
import pytest

from configs import models
from lwm.cost import chips
from lwm.cost.traced import transfers
from lwm.infer.ahead import trace
from lwm.infer.roofline import estimate_decode, estimate_prefill
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.plan import Topology, compile_program, load
from lwm.plan.memory import shard_bytes

CONTEXT = 1 << 17
# Of the query in a layer of the tiny model. Only the model's width has the factor 11.
SMALLEST_MATRIX = 176 * 64
ARRAY = re.compile(r"\b[a-z]+\d+\[([\d,]+)\]")


def sizes_in(program, mesh):
  """The dimensions of all arrays of a program that is compiled for the devices of a mesh."""
  with jax.set_mesh(mesh):
    text = program.lower().compile().as_text()
  return {tuple(map(int, shape.split(","))) for shape in ARRAY.findall(text)}


@pytest.fixture(scope="module")
def config():
  config = models.debug(text_vocab_size=128, vision_vocab_size=0)
  config.num_layers, config.width, config.feed_forward_width = 3, 176, 192
  config.num_heads = config.num_kv_heads = 8
  return config


@pytest.mark.slow
@pytest.mark.parametrize(
  "sizes, cache",
  [(dict(ring=8), "dense"), (dict(ring=2, ulysses=2, tensor=2), "int8")],
  ids=("ring", "mixture"),
)
def test_neither_cache_nor_weights_are_gathered(config, sizes, cache):
  mesh = make_mesh(MeshConfig(fsdp=1, **sizes), jax.devices())
  short, long = (
    trace(config, mesh, context=context, chunk=64, cache=cache) for context in (4096, 8192)
  )
  for name in ("prefill", "decode"):
    sent, same = (
      list(transfers(getattr(programs, name).jaxpr.jaxpr, mesh.shape)) for programs in (short, long)
    )
    # Nothing that grows with the cache travels.
    assert sent and sent == same
    shapes = sizes_in(getattr(long, name), mesh)
    # Each device has its own columns of all layers, and never those of all devices.
    columns = 8192 * sizes.get("tensor", 1) // 8
    assert any(shape[:3] == (3, 1, columns) for shape in shapes)
    assert max(dimension for shape in shapes for dimension in shape) == columns
    # In prefill, the weights of one layer at a time are gathered; in decode, none are.
    wide = [shape for shape in shapes if math.prod(shape) % 11 == 0]
    stacked, others = (
      [math.prod(s) for s in wide if (s[0] == 3) == is_first] for is_first in (1, 0)
    )
    assert max(stacked) < 3 * SMALLEST_MATRIX
    assert (max(others) >= SMALLEST_MATRIX) == (name == "prefill")
  assert max(transfer.bytes for transfer in sent) < SMALLEST_MATRIX


def test_roofline_by_hand(config):
  """On eight H200, with an H200's bandwidths."""
  chip = chips.of_kind("NVIDIA H200")
  topology = Topology("h200:1x8", chip, tuple(jax.devices()), devices_per_host=8)
  mesh = make_mesh(MeshConfig(fsdp=1, ring=8), jax.devices())
  programs = trace(config, mesh, context=4096, chunk=512)
  prefill, decode = (
    estimate(config, mesh, topology, programs) for estimate in (estimate_prefill, estimate_decode)
  )
  body = 3 * (4 * 176 * 64 + 3 * 176 * 192)
  pairs = 4096 * 4097 / 2
  assert prefill.flops == pytest.approx((2 * body * 4096 + 3 * 4 * 64 * pairs) / 8)
  assert prefill.seconds["compute"] == pytest.approx(prefill.flops / (0.63 * 989e12))
  # Of the weights, kept in bfloat16, all but the embedding; and the float32 cache.
  read = 2 * (body + 176 * 128) / 8 + 2 * 3 * 64 * 4096 * 4 / 8
  assert decode.bytes == pytest.approx(read, rel=0.02)
  busy = decode.seconds["compute"] + decode.seconds["memory beyond compute"]
  assert busy == pytest.approx(decode.bytes / (0.86 * 4.8e12))
  # Nine in each layer, one for the embedding, and one for the logits.
  assert decode.collectives == 3 * 9 + 2
  # Query, key and value; gate and up; maxima, results and sums of attention; each is reduced.
  reduced = 3 * (3 * 64 + 2 * 192 + 8 + 8 * 9) + 128
  joined = (2 * 3 + 1) * 176
  assert decode.sent == pytest.approx(7 / 8 * 4 * (2 * reduced + joined))
  wires = decode.collectives * 5e-6 + decode.sent / 450e9
  assert decode.seconds["collectives"] == pytest.approx(wires)
  assert decode.total == pytest.approx(busy + wires)


@pytest.mark.slow
def test_no_device_holds_the_whole_cache_or_whole_weights():
  """A 7B model with three layers: what a device has beside its shards grows with neither."""
  config = models.lwm_7b()
  config.num_layers = 3
  topology = load("v5p:2x2x1")
  devices = make_mesh(MeshConfig(fsdp=1, ring=2, tensor=2), topology.devices)
  programs = trace(config, devices, context=CONTEXT, chunk=2048)
  layer_of_keys = CONTEXT * config.width * 2
  cache = 2 * config.num_layers * layer_of_keys
  assert shard_bytes(programs.cache) == pytest.approx(cache / 4, rel=1e-3)
  weights = sum(math.prod(leaf.shape) * 2 for leaf in jax.tree.leaves(programs.params))
  assert shard_bytes(programs.params) == pytest.approx(weights / 4, rel=1e-3)
  for program in (programs.prefill, programs.decode):
    with jax.set_mesh(devices):
      lowered = program.lower()
    memory, compilation = compile_program(lowered, topology, programs.params)
    # The largest buffers are the device's own shards of keys and values.
    assert memory.buffers[0].bytes == cache / 2 / 4
    # Heads are divided over `tensor`, and positions over the ring.
    shapes = compilation.text.count(f"[{config.num_layers},1,{CONTEXT // 2}")
    assert shapes and f",{CONTEXT}," not in compilation.text
    # In decode, not even one layer of keys, nor the weights of a layer, is held beside the shards.
    bound = layer_of_keys if program is programs.prefill else 2e8
    assert memory.temporaries < bound
