"""Low-rank additions: merged into the projections, and over a mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

from lwm.config.model import LoraConfig
from lwm.model import build
from lwm.model.lora import A, B, merged

LORA = LoraConfig(rank=3, alpha=6)


@pytest.fixture(scope="module")
def batch(tiny):
  rng = np.random.default_rng(6)
  return tiny.pack([[tiny.document(rng, 9, 0), tiny.document(rng, 11, 1)] for _ in range(2)], 24)


@pytest.fixture(scope="module")
def config(tiny):
  return tiny.config(num_kv_heads=4, attention_bias=True, lora=LORA)


@pytest.fixture(scope="module")
def expected(tiny, batch, config):
  return tiny.loss_and_gradients(config, tiny.mesh(), "contiguous", batch)


def merge(params):
  """Parameters of a model with LORA as those of the same model without it."""
  leaves = traverse_util.flatten_dict(params, sep=".")
  for name in [name for name in leaves if name.endswith(A)]:
    base = name.removesuffix(A)
    layers = zip(leaves[base], leaves.pop(name), leaves.pop(base + B), strict=True)
    leaves[base] = np.stack([merged(*layer, LORA) for layer in layers])
  return traverse_util.unflatten_dict(leaves, sep=".")


@pytest.mark.slow
def test_merged_parameters_give_the_same_losses(tiny, batch, config, expected):
  plain = dataclasses.replace(config, lora=None)
  params = merge(jax.tree.map(np.asarray, tiny.init(build(config), tiny.mesh())))
  run = tiny.losses_program(plain, tiny.mesh(), "contiguous")
  sums, gradients = run(batch, params)
  tiny.assert_close(sums, expected[0], 1e-5)
  # The base's gradients are those of the merged model.
  attention = expected[1]["blocks"]["attention"]
  base = {name: value for name, value in attention.items() if "lora" not in name}
  tiny.assert_close(base, gradients["blocks"]["attention"], 1e-4)
  # The addition does something.
  without = run(batch)
  assert np.abs(without[0].nll / sums.nll - 1).max() > 1e-2


@pytest.mark.slow
def test_eight_devices_equal_one(tiny, batch, config, expected):
  config = dataclasses.replace(config, head_groups=2)
  mesh = tiny.mesh(fsdp=2, ring=2, tensor=2)
  tiny.assert_close(tiny.loss_and_gradients(config, mesh, "zigzag", batch), expected, 1e-5)
