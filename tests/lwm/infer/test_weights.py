"""Quantized and bfloat16 parameters in the model, from memory and from checkpoints."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import models
from kernels.quantised_matmul import GRIDS, dequantize
from lwm import model as model_lib
from lwm.config.model import AdapterConfig, LoraConfig
from lwm.errors import UserError
from lwm.infer import num_bytes, quantized_params
from lwm.model.quantised import EMBEDDING, QuantizedKernel
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules

ONE = MeshConfig(fsdp=1)
FOUR = MeshConfig(fsdp=2, tensor=2)
B, P = 4, 9


def mesh(config):
  sizes = config.resolve(math.prod(dataclasses.astuple(config)))
  return make_mesh(config, jax.devices()[: math.prod(sizes.values())])


def build(**changes):
  config = dataclasses.replace(models.debug(text_vocab_size=320), **changes)
  return model_lib.build(config, ShardingRules(sequence=None))


def flat(params):
  return traverse_util.flatten_dict(params, sep=".")


def reader(params):
  arrays = {path: np.asarray(array) for path, array in flat(params).items()}
  return lambda path, layer: arrays[path] if layer is None else arrays[path][layer]


def numbers(params, like):
  """The parameters that quantized ones stand for, placed as `like` is."""
  result = {}
  for path, array in flat(params).items():
    if isinstance(array, QuantizedKernel):
      weight_LxKxN = np.asarray(dequantize(jax.tree.map(np.asarray, array.matrix)))
      array = weight_LxKxN[0].T if path == EMBEDDING else weight_LxKxN
    old = flat(like)[path]
    result[path] = jax.device_put(np.asarray(array).reshape(old.shape), old.sharding)
  return traverse_util.unflatten_dict(result, sep=".")


def prompt_and_token(model):
  """A function from parameters to the logits after a prompt and after one more token."""
  tokens_BxP = jnp.asarray(np.random.default_rng(0).integers(0, 320, (B, P)), jnp.int32)

  def run(params):
    cache = model.init_cache(B, 128)
    first_BxV, cache = model.decode(params, tokens_BxP, cache, rope_theta=1e4)
    second_BxV, _ = model.decode(params, tokens_BxP[:, :1], cache, rope_theta=1e4)
    return jnp.stack([first_BxV, second_BxV])

  return jax.jit(run)


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh_config, name, changes",
  (
    (ONE, "int4", dict(tied_head=True)),
    (
      ONE,
      "int8",
      dict(
        attention_bias=True, lora=LoraConfig(2, targets=["out", "gate"]), adapter=AdapterConfig()
      ),
    ),
    (FOUR, "int8", dict(tied_head=True)),
    (FOUR, "int8_32", dict(width=64, head_dim=16)),
  ),
)
def test_logits_are_those_of_the_numbers_that_codes_stand_for(mesh_config, name, changes):
  model = build(**changes)
  with jax.set_mesh(mesh(mesh_config)):
    params = jax.jit(model.init)(jax.random.key(0))
    quantized = quantized_params(model, reader(params), GRIDS[name])
    run = prompt_and_token(model)
    actual, expected = run(quantized), run(numbers(quantized, params))
    assert float(jnp.abs(expected - run(params)).max()) > 1e-4  # Rounding shows.
  finite = np.isfinite(expected)
  np.testing.assert_allclose(np.asarray(actual)[finite], np.asarray(expected)[finite], atol=2e-5)


def test_codes_are_divided_as_the_floats_were():
  model = build(width=64, head_dim=16)
  with jax.set_mesh(mesh(FOUR)):
    params = jax.jit(model.init)(jax.random.key(0))
    whole = flat(quantized_params(model, reader(params), GRIDS["int4"]))
  for path, array in flat(params).items():
    name = path.rpartition(".")[2]
    if isinstance(whole[path], QuantizedKernel):
      codes = whole[path].matrix.codes
      shares = [
        math.prod(a.shape) / math.prod(a.sharding.shard_shape(a.shape)) for a in (array, codes)
      ]
      assert shares[0] == shares[1], path
    else:
      assert name in ("scale",) and whole[path].dtype == jnp.float32


@pytest.mark.parametrize("name, bits", (("int8", 8), ("int4", 5)))
def test_bytes_are_those_of_the_codes(name, bits):
  model = build()
  with jax.set_mesh(mesh(ONE)):
    params = jax.jit(model.init)(jax.random.key(0))
    quantized = flat(quantized_params(model, reader(params), GRIDS[name]))
  kernels = [path for path in quantized if path.startswith("blocks") and "norm" not in path]
  size = sum(flat(params)[path].size for path in kernels)
  scales = 0
  if name == "int8":
    scales = sum(4 * quantized[path].matrix.scales.size for path in kernels)
  assert num_bytes([quantized[path] for path in kernels]) == size * bits / 8 + scales


def test_groups_that_do_not_divide_are_one_sentence():
  model = build(width=96)
  with jax.set_mesh(mesh(FOUR)):
    params = jax.jit(model.init)(jax.random.key(0))
    message = r"96 inputs in groups of 32 do not divide over 2 devices: .* fsdp x expert x ring x"
    with pytest.raises(UserError, match=message):
      quantized_params(model, reader(params), GRIDS["int4"])
  with jax.set_mesh(mesh(ONE)):
    message = r"96 inputs in groups of 64 do not divide over 1 devices"
    with pytest.raises(UserError, match=message):
      quantized_params(model, reader(params), GRIDS["int4_64"])
