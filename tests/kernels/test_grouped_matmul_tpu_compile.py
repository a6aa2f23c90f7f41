"""The TPU kernels of the grouped product compile for real TPUs, without a TPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, PartitionSpec as P

from kernels.experts import Settings, choose, expert_feed_forward, grouped_matmul
from kernels.feed_forward.reference import feed_forward
from lwm.parallel import xla_flags
from tests.kernels.compile_for_tpu import TOPOLOGIES, compiled, one
from tests.kernels.hlo_schedule import Schedule


def shapes(K=4096, N=1536, E=8, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct((3000, K), dtype), jax.ShapeDtypeStruct((E, K, N), dtype)


@pytest.mark.parametrize(
  "generation, dtype", (("v5p", "bfloat16"), ("v6e", "float32"), ("tpu7x", "bfloat16"))
)
def test_compiles_forward_and_backward(generation, dtype):
  x, weight = shapes(dtype=dtype)

  def run(x, weight, sizes, cotangent):
    out, pull_back = jax.vjp(lambda x, weight: grouped_matmul(x, weight, sizes), x, weight)
    return out, *pull_back(cotangent)

  program = compiled(
    run,
    one(generation),
    x,
    weight,
    jax.ShapeDtypeStruct((8,), jnp.int32),
    jax.ShapeDtypeStruct((3000, 1536), dtype),
  )
  text = program.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  # The gradient of the weights in float32, and little more: no rows for every expert.
  assert program.memory_analysis().temp_size_in_bytes < 1.2 * weight.size * 4


def test_the_platform_and_the_shapes_choose_the_backend():
  assert choose(None, *shapes()).name == "xla"
  with jax.set_mesh(one("v5p")):
    assert choose(None, *shapes()).name == "pallas_tpu"
    assert choose(None, *shapes(N=1408 - 64)).name == "ragged_dot"
    with pytest.raises(ValueError, match="multiples of 128, not 4096 and 1344"):
      choose("pallas_tpu", *shapes(N=1344))


@pytest.mark.slow
def test_experts_of_four_chips_compute_while_the_rows_that_exist_travel():
  T, M, F, E = 8192, 128, 128, 8
  name, options = TOPOLOGIES["v5p"]
  topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  mesh = Mesh(topology.devices, ("expert",), axis_types=(AxisType.Explicit,))
  settings = Settings(
    E,
    exchange_axes=("expert",),
    chunk=1024,
    overlaps=True,
    is_ragged=True,
    shared=lambda x_CxM, weights: feed_forward(x_CxM, *weights),
  )

  def local(x_TxM, expert_Txk, share_Txk, weights):
    # The shared network is that of the first local expert.
    shared = [weight[0] for weight in weights]
    return expert_feed_forward(
      x_TxM, expert_Txk, share_Txk, *weights, settings, shared_weights=shared
    )[0]

  def run(x_TxM, expert_Txk, share_Txk, *weights):
    def network(x_TxM, share_Txk, weights):
      spec = P("expert")
      return jax.shard_map(local, in_specs=spec, out_specs=spec)(
        x_TxM, expert_Txk, share_Txk, weights
      )

    out_TxM, pull_back = jax.vjp(network, x_TxM, share_Txk, weights)
    return pull_back(out_TxM)

  array = jax.ShapeDtypeStruct
  program = compiled(
    run,
    mesh,
    array((T, M), jnp.bfloat16),
    array((T, 2), jnp.int32),
    array((T, 2), jnp.float32),
    *(array(shape, jnp.bfloat16) for shape in ((E, M, F), (E, M, F), (E, F, M))),
    spec=P("expert"),
    options=xla_flags.TPU,
  )
  transfers = Schedule(program.as_text()).transfers()
  # Two halves per iteration, and two iterations. Forward: there and back. Backward: tokens and the
  # gradients of results there, results and the gradients of tokens back.
  assert [transfer.times for transfer in transfers] == [2] * 2 * (2 + 4)
  overlapping = [transfer for transfer in transfers if transfer.kernels]
  assert len(overlapping) >= len(transfers) / 2
  beside = set.union(*(set(transfer.kernels) for transfer in overlapping))
  # Products of the experts, and those of the shared network.
  assert any("grouped" in name for name in beside)
  assert any("convolution" in name for name in beside)
