"""Mixture-of-modality adapters: what routes them, what they change, and over a mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

from kernels.ring import Layout
from lwm.config.model import AdapterConfig
from lwm.model import build
from lwm.model.adapter import has_vision
from lwm.parallel.sharding import ShardingRules

# A low temperature makes the router choose.
ADAPTER = AdapterConfig(width=3, scale=0.5, temperature=0.2)


@pytest.fixture(scope="module")
def batch(tiny):
  """Documents of text, of vision, and of both; the prompts of the last change inside."""
  rng = np.random.default_rng(6)
  text, vision = tiny.document(rng, 5, 0), tiny.document(rng, 6, 1)
  both = [np.concatenate(pair) for pair in zip(tiny.document(rng, 4, 0), vision)]
  return tiny.pack([[text, both, vision], [both, text]], 24)


@pytest.fixture(scope="module")
def config(tiny):
  return tiny.config(num_kv_heads=4, adapter=ADAPTER)


@pytest.fixture(scope="module")
def on_one_device(tiny, config):
  return tiny.losses_program(config, tiny.mesh(), "contiguous")


@pytest.fixture(scope="module")
def expected(batch, on_one_device):
  return on_one_device(batch)


def prompts(batch, text_vocab_size):
  """Whether each token's document contains a vision id up to the token, by definition."""
  return np.array(
    [
      [any(row[start : column + 1] >= text_vocab_size) for column, start in enumerate(starts)]
      for row, starts in zip(batch["tokens"], batch["key_start"])
    ]
  )


@pytest.mark.parametrize(
  "sizes,kind",
  [
    ({}, "contiguous"),
    (dict(ring=2, ulysses=2, tensor=2), "contiguous"),
    (dict(fsdp=2, ring=4), "zigzag"),
    (dict(ring=2, ulysses=4), "zigzag"),
    # Some devices hold the end of one chunk and the start of another one.
    (dict(ring=2, ulysses=3), "zigzag"),
  ],
  ids=str,
)
def test_prompts_over_a_ring_are_those_of_the_definition(tiny, config, batch, sizes, kind):
  mesh, rules = tiny.mesh(**sizes), ShardingRules()
  layout = Layout(kind, mesh.shape["ring"])
  find = tiny.jit(lambda tokens, start: has_vision(config, rules, layout, tokens, start))
  with jax.set_mesh(mesh):
    rows = tiny.place(batch, layout, mesh, rules)
    actual = np.asarray(find(rows["tokens"], rows["key_start"]))
  expected = prompts(batch, config.text_vocab_size)[:, layout.permutation(24)]
  np.testing.assert_array_equal(actual, expected)
  assert 0.2 < expected.mean() < 0.8


@pytest.mark.slow
def test_a_base_is_unchanged_until_its_adapters_are_trained(
  tiny, batch, config, on_one_device, expected
):
  plain = dataclasses.replace(config, adapter=None)
  base = tiny.init(build(plain), tiny.mesh())
  with jax.set_mesh(tiny.mesh()):
    added = tiny.jit(build(config).init)(jax.random.key(0))
  names = [traverse_util.flatten_dict(tree, sep=".") for tree in (added, base)]
  joined = traverse_util.unflatten_dict(names[0] | names[1], sep=".")
  sums, gradients = tiny.loss_and_gradients(plain, tiny.mesh(), "contiguous", batch, params=base)
  changed = on_one_device(batch, joined)
  jax.tree.map(np.testing.assert_array_equal, changed[0], sums)
  assert set(names[0]) - set(names[1]) == {
    "adapter_modalities",
    *(f"blocks.adapter.{name}" for name in ("router", "bottleneck_in", "bottleneck_out")),
  }
  # What is trained first; the others follow.
  trained = traverse_util.flatten_dict(changed[1], sep=".")
  assert [name for name in names[0] if "adapter" in name and trained[name].any()] == [
    "blocks.adapter.bottleneck_out"
  ]
  # With trained adapters, the losses and the router differ.
  assert np.abs(expected[0].nll / sums.nll - 1).max() > 1e-2
  assert all(leaf.any() for leaf in jax.tree.leaves(expected[1]))


@pytest.mark.slow
def test_eight_devices_equal_one(tiny, batch, config, expected):
  config = dataclasses.replace(config, head_groups=2, remat="dots")
  mesh = tiny.mesh(fsdp=2, ring=2, tensor=2)
  tiny.assert_close(tiny.loss_and_gradients(config, mesh, "zigzag", batch), expected, 1e-5)
