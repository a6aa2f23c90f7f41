"""The same losses and gradients on every mesh and layout, packed documents of two modalities."""

import numpy as np
import pytest

MESHES = [
  (dict(fsdp=8), "contiguous"),
  (dict(ring=8), "zigzag"),
  (dict(data=2, fsdp=2, tensor=2), "contiguous"),
  (dict(fsdp=2, ring=2, tensor=2), "zigzag"),
  (dict(ring=2, ulysses=4), "zigzag"),
  (dict(fsdp=2, ulysses=2, tensor=2), "contiguous"),
]


def batch_of(tiny):
  rng = np.random.default_rng(0)
  lengths = rng.integers(3, 14, (8, 3))
  rows = [
    [tiny.document(rng, length, (r + n) % 2) for n, length in enumerate(row[:2])]
    + [tiny.document(rng, min(row[2], 32 - row[:2].sum()), r % 2)]
    for r, row in enumerate(lengths)
  ]
  return tiny.pack(rows, 32)


@pytest.fixture(scope="module")
def expected(tiny):
  return tiny.loss_and_gradients(tiny.config(), tiny.mesh(), "contiguous", batch_of(tiny))


@pytest.mark.slow
def test_biases_and_norms_of_queries_and_keys_equal_one_device(tiny):
  settings = dict(attention_bias=True, query_key_norm=True, num_kv_heads=4)
  batch = batch_of(tiny)
  expected = tiny.loss_and_gradients(tiny.config(**settings), tiny.mesh(), "contiguous", batch)
  config = tiny.config(**settings, head_groups=2)
  mesh = tiny.mesh(fsdp=2, ring=2, tensor=2)
  tiny.assert_close(tiny.loss_and_gradients(config, mesh, "zigzag", batch), expected, 1e-5)


@pytest.mark.parametrize("sizes,kind", MESHES, ids=str)
def test_losses_and_gradients_equal_one_device(tiny, expected, sizes, kind):
  actual = tiny.loss_and_gradients(tiny.config(), tiny.mesh(**sizes), kind, batch_of(tiny))
  tiny.assert_close(actual, expected, 1e-5)
