"""FLOPs, bytes and seconds against numbers worked out by hand."""

import functools

import jax
import pytest

from lwm.config.experiment import Experiment, Stage
from lwm.config.model import REMAT_POLICIES, ExpertsConfig, ModelConfig
from lwm.cost import chips
from lwm.cost.layer import KEPT
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.plan import topology
from lwm.plan.roofline import estimate
from lwm.plan.topology import Topology
from lwm.plan.traffic import step_traffic

# Two blocks of 4 x 256 x 256 + 3 x 256 x 512 weights, and two tables of 1000 x 256.
BODY, ENDS = 2 * 655_360, 512_000
TOKENS = 2048
PAIRS = 2 * 1024 * 1025 // 2
# FLOPs of the products in two blocks that are computed again: all except the down projection.
AGAIN = 2 * 2 * (655_360 - 256 * 512) * TOKENS


def planned(machine, remat="full", layout="zigzag", sequence_length=1024, experts=None, **sizes):
  model = ModelConfig(
    num_layers=2,
    width=256,
    num_heads=2,
    num_kv_heads=2,
    head_dim=128,
    feed_forward_width=512,
    text_vocab_size=1000,
    remat=remat,
    experts=experts,
  )
  stage = Stage(
    sequence_length=sequence_length,
    tokens_per_batch=2 * sequence_length,
    layout=layout,
    mesh=MeshConfig(**{"fsdp": 1, **sizes}),
  )
  mesh = make_mesh(stage.mesh, machine.devices)
  return Experiment(model=model, stages=[stage]), stage, mesh, machine


def traffic(machine, **settings):
  return {(part.axes, part.what): part for part in step_traffic(*planned(machine, **settings))}


@pytest.fixture(scope="module")
def v5p():
  return topology.load("v5p:2x2x1")


def test_copies_of_experts(v5p):
  """Each device has four of eight experts and two spare slots; the other two divide the width."""
  sent = traffic(
    v5p,
    expert=2,
    fsdp=2,
    experts=ExpertsConfig(8, 2, width=512, placement="replicate", spare_slots=2),
  )
  expert = 3 * 256 * 512
  # In two layers. Forward, for the backward pass, and gradients; half of the four slots of both
  # devices is sent.
  copies = sent[("expert", "ulysses"), "copies of experts"]
  assert copies.bytes == 2 * 2 * expert / 2 * (2 + 2 + 4)
  # Half of the width of each slot's expert is gathered.
  weights = sent[("fsdp", "ring"), "weights"]
  assert weights.bytes == 2 * (4 + 2) * expert / 2 * (2 + 2)


@pytest.mark.parametrize("k, remat, passes", [(1, "full", 4), (1, "none", 3), (2, "full", 4)])
def test_what_waits_for_the_device_with_the_largest_load(v5p, k, remat, passes):
  experts = ExpertsConfig(8, k, width=512, shared_experts=1)
  roofline = estimate(*planned(v5p, expert=2, fsdp=2, remat=remat, experts=experts))
  # Two layers; the backward pass counts twice, and once more where products are computed again.
  flops = passes * k * 6 * 256 * 512 * 2 * TOKENS
  tokens = roofline.seconds["tokens to experts and back"]
  assert tokens > 0
  # Two experts per token on two devices: all tokens are gathered, whatever they choose.
  waiting = flops / (0.75 * 4 * 459e12) + (tokens if k == 1 else 0)
  assert roofline.expert_seconds == pytest.approx(waiting)
  assert estimate(*planned(v5p, fsdp=4)).expert_seconds == 0


def test_flops_and_seconds(v5p):
  roofline = estimate(*planned(v5p, fsdp=4))
  products = 6 * BODY * TOKENS + 6 * 256 * 1000 * TOKENS
  attention = 12 * 2 * 256 * PAIRS
  assert roofline.model_flops == products + attention
  # All products of a block except the down projection; the logits; the forward pass of attention,
  # and three more products in its backward pass.
  again = AGAIN + 2 * 256 * 1000 * TOKENS
  attention_again = 10 * 2 * 256 * PAIRS
  assert roofline.recompute_flops == again + attention_again
  peak = 4 * 459e12
  compute = (products + again) / (0.75 * peak) + (attention + attention_again) / (0.55 * peak)
  assert roofline.seconds["compute"] == pytest.approx(compute)
  assert roofline.step_seconds == pytest.approx(sum(roofline.seconds.values()))
  assert roofline.mfu == pytest.approx((products + attention) / peak / roofline.step_seconds)
  assert roofline.rate_per_chip == pytest.approx(TOKENS / roofline.step_seconds / 4)


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
  "sizes",
  [dict(fsdp=4), dict(fsdp=1, ring=4), dict(fsdp=2, ulysses=2)],
  ids=("fsdp", "ring", "fsdp and ulysses"),
)
def test_bytes_of_weights(v5p, sizes):
  """Weights are stored in shards over all axes of the tokens except data."""
  parts = {what: part for (axes, what), part in traffic(v5p, **sizes).items() if "fsdp" in axes}
  # Three quarters come from other devices: bfloat16 twice for blocks, float32 once for tables.
  assert parts["weights"].bytes == 3 / 4 * 2 * 2 * BODY
  assert parts["tables"].bytes == 3 / 4 * 4 * ENDS
  # Two dimensions of two chips, with one link each.
  assert parts["weights"].bandwidth == 2 * 90e9
  assert parts["gradients"].bytes == 3 / 4 * 4 * BODY
  assert parts["gradients of tables"].bytes == 3 / 4 * 4 * ENDS
  kept = traffic(v5p, remat="none", **sizes)
  weights = next(part for (_, what), part in kept.items() if what == "weights")
  assert weights.bytes == 3 / 4 * 2 * BODY


def test_bytes_over_data(v5p):
  parts = traffic(v5p, data=2, fsdp=2)
  # Each device all-reduces its fsdp shard of blocks and tables.
  assert parts[("data",), "gradients"].bytes == 2 * 1 / 2 * 4 * (BODY + ENDS) / 2


def test_bytes_of_offload(v5p):
  parts = traffic(v5p, fsdp=1, ring=2, tensor=2, remat="offload")
  # Inputs of two blocks, half of a ring shard's 1024 tokens, there and back.
  assert parts[("host",), "activations kept"].bytes == 2 * 2 * 512 * 256 * 2
  assert parts[("host",), "activations kept"].bandwidth == 16e9
  parts = traffic(v5p, fsdp=1, ring=2, tensor=2, remat="offload_attention")
  # Also the result and its log-sum-exp, of 1024 tokens for one head.
  kept = 512 * 256 * 2 + 1024 * (128 * 2 + 4)
  assert parts[("host",), "activations kept"].bytes == 2 * 2 * kept
  arguments = planned(v5p, fsdp=4)
  arguments[0].optimizer.offload = True
  part = next(part for part in step_traffic(*arguments) if part.what == "moments")
  # Two float32 moments for a quarter of the parameters, in both directions at the same time.
  assert part.bytes == 2 * 8 * (BODY + ENDS) / 4
  assert part.seconds == pytest.approx(8 * (BODY + ENDS) / 4 / 16e9)
  roofline = estimate(*arguments)
  assert roofline.seconds["moments from the host and back"] == part.seconds


def test_frozen_parameters_have_no_gradients_and_no_moments(v5p):
  arguments = planned(v5p, fsdp=4)
  whole = estimate(*arguments)
  experiment = arguments[0]
  experiment.optimizer.trainable, experiment.optimizer.offload = ["blocks.attention.*"], True
  # Norms have few elements.
  about = functools.partial(pytest.approx, rel=2e-3)
  attention = 2 * 4 * 256 * 256
  part = estimate(*arguments)
  assert part.model_flops == about(
    whole.model_flops - 2 * TOKENS * (BODY + 256 * 1000) + 2 * TOKENS * attention
  )
  assert part.recompute_flops == whole.recompute_flops
  sent = {what.what: what.bytes for what in part.traffic}
  assert sent["gradients"] == about(3 / 4 * attention * 4)
  assert sent["moments"] == about(2 * 8 * attention / 4)
  assert "gradients of tables" not in sent


def test_bytes_of_the_ring(v5p):
  part = traffic(v5p, ring=4)[("ring",), "keys and values"]
  # A device's keys and values, 512 tokens of two heads: three hops in each of forward, recompute
  # and backward in bfloat16, and four hops of their gradients in float32.
  assert part.bytes == 2 * (2 * 512 * 2 * 128) * (3 * 3 * 2 + 4 * 4)
  assert part.bandwidth == 90e9


def test_bytes_of_tensor_parallelism(v5p):
  part = traffic(v5p, tensor=2, fsdp=2)[("tensor",), "activations"]
  # Four halves of an all-reduce in the forward pass, four in the backward pass, and three for what
  # is computed again.
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
  # A device has a quarter of the pairs, and computes a quarter of those in each hop.
  assert hop.forward_compute == pytest.approx(4 * 2 * 128 * pairs / 16 / (0.55 * 459e12))
  assert hop.forward_transfer == pytest.approx(2 * (2 * length / 4) * 2 * 128 * 2 / 90e9)
  assert hop.backward_transfer == pytest.approx(3 * hop.forward_transfer)
  assert hop.hides == hides


def test_contiguous_layouts_wait_for_the_last_shard(v5p):
  balanced = estimate(*planned(v5p, ring=4)).seconds["compute"]
  uneven = estimate(*planned(v5p, ring=4, layout="contiguous")).seconds["compute"]
  attention = (12 + 10) * 2 * 256 * PAIRS / (4 * 459e12 * 0.55)
  # The last of four shards attends to three shards and half of its own; the mean shard to two.
  assert uneven - balanced == pytest.approx((3.5 / 2 - 1) * attention)


def test_softmax_over_all_ids(v5p):
  experiment, *machine = planned(v5p, fsdp=4)
  text = estimate(experiment, *machine)
  experiment.model.vision_vocab_size = 600
  assert estimate(experiment, *machine).model_flops == text.model_flops
  experiment.loss.softmax_range = "all"
  every = estimate(experiment, *machine)
  # Logits are computed twice.
  assert every.model_flops - text.model_flops == 6 * 256 * 600 * TOKENS
  assert every.recompute_flops - text.recompute_flops == 2 * 256 * 600 * TOKENS


def test_groups_of_heads_project_once_more_only_where_all_is_computed_again(v5p):
  """The numbers agree with counts in compiled programs."""
  for remat, more in (("none", 0), ("attention", 0), ("full", 2 * 2 * 3 * 256 * 256 * TOKENS)):
    experiment, *machine = planned(v5p, remat=remat, fsdp=2, ulysses=2)
    whole = estimate(experiment, *machine)
    experiment.model.head_groups = 2
    groups = estimate(experiment, *machine)
    assert groups.recompute_flops - whole.recompute_flops == more
    sent = [
      sum(part.bytes for part in roofline.traffic if part.what == "heads")
      for roofline in (whole, groups)
    ]
    # Query, key, value and result in each of three passes; query, key and value once more.
    assert sent[1] / sent[0] == (15 / 12 if more else 1)


def test_a_tied_head_is_one_table_less_to_read_and_to_update(v5p):
  experiment, *machine = planned(v5p, fsdp=4, sequence_length=64)
  untied = estimate(experiment, *machine).seconds
  experiment.model.tied_head = True
  tied = estimate(experiment, *machine).seconds
  name = "memory beyond compute"
  assert tied[name] > 0
  # Per parameter: gathered in bfloat16, written and read in three passes; and of a quarter of them
  # the parameter, the gradient and two moments, read and written in float32.
  saved = 1000 * 256 * (3 * 2 * 2 + 4 * 2 * 4 / 4)
  assert untied[name] - tied[name] == pytest.approx(saved / 2.765e12)


def test_every_remat_policy_says_what_it_keeps():
  assert set(KEPT) == set(REMAT_POLICIES)


def test_a_hop_carries_repeated_key_heads(v5p):
  def transfer(num_kv_heads):
    experiment, *machine = planned(v5p, ring=2, ulysses=2)
    experiment.model.num_kv_heads = num_kv_heads
    return estimate(experiment, *machine).hop.forward_transfer

  # A single key head is repeated for two devices.
  assert transfer(1) == transfer(2)


def test_messages_of_a_ring_share_links():
  """If `tensor` takes the nearest neighbours, the messages of two rings share links."""
  pod = topology.load("v5e:16x16")
  keys = ("ring",), "keys and values"
  assert traffic(pod, ring=256)[keys].bandwidth == 45e9
  assert traffic(pod, ring=128, tensor=2)[keys].bandwidth == 45e9 / 2
  # Both devices of a chip send at the same time.
  ironwood = topology.load("tpu7x:2x2x1")
  assert traffic(ironwood, ring=8)[keys].bandwidth == 90e9
  assert traffic(ironwood, ring=4, tensor=2)[keys].bandwidth == 90e9 / 2


def test_links_that_join_both_ends():
  """Such links exist along a whole pod's side on v5e and in cubes on v5p; both directions count."""
  for name, sizes, links in (
    ("v5e:16x16", dict(fsdp=256), 4),
    ("v5e:4x4", dict(fsdp=16), 2),
    ("v5e:8x16", dict(fsdp=128), 3),
    ("v5p:4x4x4", dict(fsdp=64), 6),
    ("v5p:2x2x4", dict(fsdp=16), 3),
  ):
    machine = topology.load(name)
    weights = next(p for (_, what), p in traffic(machine, **sizes).items() if what == "weights")
    assert weights.bandwidth == links * machine.chip.link_bandwidth


def test_wires_of_a_gpu_cluster():
  machine = Topology(
    "h100:2x2", chips.of_kind("NVIDIA H100 80GB HBM3"), tuple(jax.devices()[:4]), devices_per_host=2
  )
  inside = traffic(machine, fsdp=2, tensor=2)
  assert inside[("tensor",), "activations"].bandwidth == 450e9
  # Both GPUs of a host use their network shares for what the four gather.
  across = traffic(machine, fsdp=4)
  weights = next(part for (_, what), part in across.items() if what == "weights")
  assert weights.bandwidth == 2 * 50e9
  assert traffic(machine, ring=4)[("ring",), "keys and values"].bandwidth == 50e9
  assert traffic(machine, fsdp=2, ring=2)[("ring",), "keys and values"].bandwidth == 450e9
