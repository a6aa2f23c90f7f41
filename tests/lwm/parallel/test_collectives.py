"""Communication in a compiled gradient: no sequence is gathered, each gradient is summed once."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from kernels.ring import Layout
from lwm.config.experiment import LossConfig
from lwm.model import ModelConfig, build
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig

B, S, M = 4, 256, 16
INTEGERS = ("tokens", "targets", "positions", "modality", "key_start", "key_stop")


def collectives(remat="full", **sizes):
  """[(kind, elements of one result, JAX operation)] of each collective of the gradient."""
  model = build(
    ModelConfig(
      num_layers=2,
      width=M,
      num_heads=2,
      num_kv_heads=2,
      head_dim=8,
      feed_forward_width=24,
      text_vocab_size=40,
      vision_vocab_size=24,
      compute_dtype="float32",
      remat=remat,
    )
  )
  mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
  layout = Layout("zigzag", mesh.shape["ring"])

  def loss(params, batch):
    sums = model.losses(params, batch, rope_theta=1e4, layout=layout, loss=LossConfig())
    return sums.loss.sum()

  with jax.set_mesh(mesh):
    params = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      model.abstract(),
      model.rules.tree_shardings(model.logical_axes, mesh),
    )
    rows = jax.NamedSharding(mesh, model.rules.spec("batch", "sequence"))
    dtypes = dict.fromkeys(INTEGERS, jnp.int32) | {"loss_weights": jnp.float32}
    batch = {
      name: jax.ShapeDtypeStruct((B, S), dtype, sharding=rows) for name, dtype in dtypes.items()
    }
    compiled = (
      jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})
      .lower(params, batch)
      .compile()
    )
  pattern = re.compile(
    r" = (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    r"(.*?)op_name=\"(.*?)\""
  )
  found = []
  for match in pattern.finditer(compiled.as_text()):
    shapes, kind, details, origin = match.groups()
    # Nothing moves in groups of one device.
    if re.search(r"'tensor'=1.*\] \{'tensor'\}", details):
      continue
    for shape in re.findall(r"\w+\[([\d,]*)\]", shapes):
      found.append((kind, math.prod(int(size) for size in shape.split(",") if size), origin))
  assert found
  return found


def gathered_sizes(**sizes):
  return [size for kind, size, _ in collectives(**sizes) if kind == "all-gather"]


@pytest.mark.slow
def test_a_ring_gathers_weights_but_no_tokens():
  found = collectives(ring=8)
  gathered = [size for kind, size, _ in found if kind == "all-gather"]
  # The largest weight is a table of 64 ids; a device's own tokens are twice that.
  assert max(gathered) == 64 * M < B * S * M // 8
  assert "all-to-all" not in {kind for kind, _, _ in found}
  # Nothing else is larger than a device's own tokens.
  assert max(size for _, size, _ in found) <= B * S * M // 8


@pytest.mark.slow
def test_tokens_are_gathered_over_tensor_alone():
  gathered = gathered_sizes(fsdp=2, ring=2, tensor=2)
  tokens = {size for size in gathered if size > 64 * M}
  # The tokens of one coordinate of fsdp x ring.
  assert tokens == {B * S * M // 4}


@pytest.mark.slow
def test_gradients_are_scattered_and_then_summed_over_data():
  found = collectives(data=2, fsdp=2, ring=2)
  scattered = sum(size for kind, size, _ in found if kind == "reduce-scatter")
  # Every weight except the norm scales, once per layer; each device gets a quarter.
  layer = 4 * M * 2 * 8 + 3 * M * 24
  assert scattered == (layer + 2 * 64 * M) // 4
  # Only the scattered parts and the norm scales are then summed over data.
  summed = sum(size for _, size, origin in found if "unreduced_psum" in origin)
  assert scattered <= summed <= scattered + 3 * M
  # All other sums are of scalars and norm scales.
  rest = [
    size for kind, size, origin in found if kind == "all-reduce" and "unreduced_psum" not in origin
  ]
  assert max(rest) <= 3 * M


@pytest.mark.slow
@pytest.mark.parametrize("remat,hops", [("full", 2), ("attention", 0)])
def test_saved_attention_is_not_sent_around_again(remat, hops):
  again = [
    origin
    for kind, _, origin in collectives(remat, ring=8)
    if kind == "collective-permute" and "rematted_computation" in origin
  ]
  assert len(again) == hops
