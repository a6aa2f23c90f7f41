"""FLOPs, bytes and seconds against numbers worked out by hand."""

import jax
import pytest

from lwm import chips
from lwm.experiment import Experiment
from lwm.experiment import MeshConfig
from lwm.experiment import Stage
from lwm.model.config import ModelConfig
from lwm.parallel.mesh import make_mesh
from lwm.plan import topology
from lwm.plan.roofline import estimate
from lwm.plan.topology import Topology
from lwm.plan.traffic import step_traffic

# Two blocks of 4 x 256 x 256 + 3 x 256 x 512 weights, and two tables of 1000 x 256.
BODY, ENDS = 2 * 655_360, 512_000
TOKENS = 2048
PAIRS = 2 * 1024 * 1025 // 2
# Products of two blocks that are computed again: all but the down projection.
AGAIN = 2 * 2 * (655_360 - 256 * 512) * TOKENS


def planned(machine, remat="full", layout="zigzag", sequence_length=1024, **sizes):
  model = ModelConfig(
      num_layers=2, width=256, num_heads=2, num_kv_heads=2, head_dim=128, feed_forward_width=512,
      text_vocab_size=1000, remat=remat,
  )
  stage = Stage(
      sequence_length=sequence_length, tokens_per_batch=2 * sequence_length, layout=layout,
      mesh=MeshConfig(**{"fsdp": 1, **sizes}),
  )
  mesh = make_mesh(stage.mesh, machine.devices)
  return Experiment(model=model, stages=[stage]), stage, mesh, machine


def traffic(machine, **settings):
  return {(part.axes, part.what): part for part in step_traffic(*planned(machine, **settings))}


@pytest.fixture(scope="module")
def v5p():
  return topology.load("v5p:2x2x1")


def test_flops_and_seconds(v5p):
  roofline = estimate(*planned(v5p, fsdp=4))
  products = 6 * BODY * TOKENS + 6 * 256 * 1000 * TOKENS
  attention = 12 * 2 * 256 * PAIRS
  assert roofline.model_flops == products + attention
  # Of a block all but the down projection, the logits; attention forward, and three products more
  # in its backward pass.
  again = AGAIN + 2 * 256 * 1000 * TOKENS
  attention_again = 10 * 2 * 256 * PAIRS
  assert roofline.recompute_flops == again + attention_again
  peak = 4 * 459e12
  compute = (products + again) / (0.75 * peak) + (attention + attention_again) / (0.55 * peak)
  assert roofline.seconds["compute"] == pytest.approx(compute)
  assert roofline.step_seconds == pytest.approx(sum(roofline.seconds.values()))
  assert roofline.mfu == pytest.approx((products + attention) / peak / roofline.step_seconds)
  assert roofline.tokens_per_second_per_chip == pytest.approx(TOKENS / roofline.step_seconds / 4)


@pytest.mark.parametrize(
    "remat, again",
    [("none", 0), ("dots", 0), ("attention", AGAIN), ("offload_attention", AGAIN)],
    ids=("none", "dots", "attention", "offload_attention"),
)
def test_recompute_follows_remat(v5p, remat, again):
  roofline = estimate(*planned(v5p, remat=remat, fsdp=4))
  always = 2 * 256 * 1000 * TOKENS + 6 * 2 * 256 * PAIRS
  assert roofline.recompute_flops == always + again


@pytest.mark.parametrize(
    "sizes", [dict(fsdp=4), dict(fsdp=1, ring=4), dict(fsdp=2, ulysses=2)],
    ids=("fsdp", "ring", "fsdp and ulysses"),
)
def test_bytes_of_weights(v5p, sizes):
  """They are stored in shards over all axes of the tokens but data."""
  parts = {what: part for (axes, what), part in traffic(v5p, **sizes).items() if "fsdp" in axes}
  # Three quarters of them come from others: bfloat16 twice for blocks, float32 once for tables.
  assert parts["weights"].bytes == 3 / 4 * 2 * 2 * BODY
  assert parts["tables"].bytes == 3 / 4 * 4 * ENDS
  # Two dimensions of two chips: a link each.
  assert parts["weights"].bandwidth == 2 * 90e9
  assert parts["gradients"].bytes == 3 / 4 * 4 * BODY
  assert parts["gradients of tables"].bytes == 3 / 4 * 4 * ENDS
  kept = traffic(v5p, remat="none", **sizes)
  weights = next(part for (_, what), part in kept.items() if what == "weights")
  assert weights.bytes == 3 / 4 * 2 * BODY


def test_bytes_over_data(v5p):
  parts = traffic(v5p, data=2, fsdp=2)
  # All-reduced, the shards that fsdp leaves; the tables' too.
  assert parts[("data",), "gradients"].bytes == 2 * 1 / 2 * 4 * (BODY + ENDS) / 2


def test_bytes_of_offload(v5p):
  parts = traffic(v5p, fsdp=1, ring=2, tensor=2, remat="offload")
  # Inputs of two blocks, half of 1024 tokens of a ring shard, there and back.
  assert parts[("host",), "activations kept"].bytes == 2 * 2 * 512 * 256 * 2
  assert parts[("host",), "activations kept"].bandwidth == 16e9
  parts = traffic(v5p, fsdp=1, ring=2, tensor=2, remat="offload_attention")
  # And of 1024 tokens for one head the result and its log-sum-exp.
  kept = 512 * 256 * 2 + 1024 * (128 * 2 + 4)
  assert parts[("host",), "activations kept"].bytes == 2 * 2 * kept
  arguments = planned(v5p, fsdp=4)
  arguments[0].optimizer.offload = True
  part = next(part for part in step_traffic(*arguments) if part.what == "moments")
  # Two float32 moments of a quarter of the parameters, both ways at the same time.
  assert part.bytes == 2 * 8 * (BODY + ENDS) / 4
  assert part.seconds == pytest.approx(8 * (BODY + ENDS) / 4 / 16e9)
  roofline = estimate(*arguments)
  assert roofline.seconds["moments from the host and back"] == part.seconds


def test_bytes_of_the_ring(v5p):
  part = traffic(v5p, ring=4)[("ring",), "keys and values"]
  # A device's keys and values, 512 tokens of two heads: three hops in each of forward, recompute
  # and backward in bfloat16, and four hops of their gradients in float32.
  assert part.bytes == 2 * (2 * 512 * 2 * 128) * (3 * 3 * 2 + 4 * 4)
  assert part.bandwidth == 90e9


def test_bytes_of_tensor_parallelism(v5p):
  part = traffic(v5p, tensor=2, fsdp=2)[("tensor",), "activations"]
  # Four halves of an all-reduce forward and four backward, three for what is computed again.
  assert part.bytes == 1 / 2 * 1024 * 256 * 2 * 2 * 11
  part = traffic(v5p, tensor=2, fsdp=2, remat="none")[("tensor",), "activations"]
  assert part.bytes == 1 / 2 * 1024 * 256 * 2 * 2 * 8


def test_nothing_crosses_a_mesh_of_one_device():
  machine = Topology("one", chips.of_kind("TPU v5"), tuple(jax.devices()[:1]))
  assert not traffic(machine)


@pytest.mark.parametrize("length, hides", [(1024, False), (262144, True)])
def test_a_hop_hides_behind_enough_attention(v5p, length, hides):
  hop = estimate(*planned(v5p, ring=4, sequence_length=length)).hop
  pairs = 2 * length * (length + 1) / 2
  # Of a quarter of the pairs, a device's share, a quarter in each hop.
  assert hop.forward_compute == pytest.approx(4 * 2 * 128 * pairs / 16 / (0.55 * 459e12))
  assert hop.forward_transfer == pytest.approx(2 * (2 * length / 4) * 2 * 128 * 2 / 90e9)
  assert hop.backward_transfer == pytest.approx(3 * hop.forward_transfer)
  assert hop.hides == hides


def test_contiguous_layouts_wait_for_the_last_shard(v5p):
  balanced = estimate(*planned(v5p, ring=4)).seconds["compute"]
  uneven = estimate(*planned(v5p, ring=4, layout="contiguous")).seconds["compute"]
  attention = (12 + 10) * 2 * 256 * PAIRS / (4 * 459e12 * 0.55)
  # The last of four shards attends to all four, the mean to two and a half.
  assert uneven - balanced == pytest.approx((4 / 2.5 - 1) * attention)


def test_wires_of_a_gpu_cluster():
  machine = Topology(
      "h100:2x2", chips.of_kind("NVIDIA H100 80GB HBM3"), tuple(jax.devices()[:4]),
      devices_per_host=2,
  )
  inside = traffic(machine, fsdp=2, tensor=2)
  assert inside[("tensor",), "activations"].bandwidth == 450e9
  # Both GPUs of a host bring in their share of what the four gather.
  across = traffic(machine, fsdp=4)
  weights = next(part for (_, what), part in across.items() if what == "weights")
  assert weights.bandwidth == 2 * 50e9
  assert traffic(machine, ring=4)[("ring",), "keys and values"].bandwidth == 50e9
  assert traffic(machine, fsdp=2, ring=2)[("ring",), "keys and values"].bandwidth == 450e9
