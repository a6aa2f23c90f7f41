"""Compiles the ring for 16 v5p chips and a million tokens, and checks which transfers overlap."""

import collections
import functools

import jax
import pytest
from jax.sharding import PartitionSpec

from kernels.attention import KeyIntervals
from kernels.ring import Layout, ring_attention
from tests.kernels import compile_for_tpu
from tests.kernels.hlo_schedule import Schedule

FORWARD = {"attention_forward"}
BACKWARD = {"attention_query_grad", "attention_key_grads"}
LENGTH, LOCAL = 2**20, 2**16


def compiled_ring(kind):
  rows = PartitionSpec(None, "ring")

  def attend(query, key, value, intervals):
    return jax.shard_map(
      functools.partial(
        ring_attention, layout=Layout(kind, 16), axis_name="ring", backend="pallas_tpu"
      ),
      in_specs=(rows, rows, rows, KeyIntervals(rows, rows)),
      out_specs=(rows, rows),
    )(query, key, value, intervals)

  return compile_for_tpu.compiled(
    compile_for_tpu.values_and_gradients(attend),
    compile_for_tpu.ring_of_sixteen(),
    *compile_for_tpu.attention_arguments(LENGTH, 128, "bfloat16"),
    spec=rows,
  )


def without_number(names):
  return {name.rstrip("0123456789").rstrip(".") for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("contiguous", "zigzag"))
def test_every_transfer_starts_before_and_ends_after_its_hops_kernels(kind):
  schedule = Schedule(compiled_ring(kind).as_text())
  transfers = schedule.transfers()
  sent = collections.Counter()
  for transfer in transfers:
    sent[transfer.array] += transfer.times
    beside = without_number(transfer.kernels)
    assert beside >= BACKWARD or (transfer.times == 15 and beside == FORWARD), transfer
  # Keys and values: 15 hops forward and 15 backward. Their gradients: 15, and home.
  shape = f"[1,{LOCAL},1,128]"
  assert sent == {f"bf16{shape}": 2 * (15 + 15), f"f32{shape}": 2 * (15 + 1)}
  # Of all kernels only that of the last forward hop, which has nothing to send, runs alone.
  alone = schedule.kernels().difference(*(transfer.kernels for transfer in transfers))
  assert without_number(alone) <= FORWARD and len(alone) <= 1
