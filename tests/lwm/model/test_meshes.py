"""The same losses and gradients on every mesh and layout, packed documents of two modalities."""

import numpy as np
import pytest

MESHES = [
    (dict(data=8), "contiguous"),
    (dict(fsdp=8), "contiguous"),
    (dict(ring=8), "contiguous"),
    (dict(ring=8), "zigzag"),
    (dict(data=2, fsdp=2, tensor=2), "contiguous"),
    (dict(fsdp=2, ring=2, tensor=2), "zigzag"),
    (dict(data=2, ring=4), "zigzag"),
    (dict(ring=4, tensor=2), "contiguous"),
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
  with_mesh = tiny.mesh()
  return tiny.loss_and_gradients(tiny.config(), with_mesh, "contiguous", batch_of(tiny))


@pytest.mark.parametrize("sizes,kind", MESHES, ids=str)
def test_losses_and_gradients_equal_one_device(tiny, expected, sizes, kind):
  actual = tiny.loss_and_gradients(tiny.config(), tiny.mesh(**sizes), kind, batch_of(tiny))
  tiny.assert_close(actual, expected, 1e-5)


def test_tied_head_equals_one_device(tiny):
  config = tiny.config(tied_head=True)
  expected = tiny.loss_and_gradients(config, tiny.mesh(), "contiguous", batch_of(tiny))
  mesh = tiny.mesh(fsdp=2, ring=2, tensor=2)
  tiny.assert_close(
      tiny.loss_and_gradients(config, mesh, "zigzag", batch_of(tiny)), expected, 1e-5
  )


def test_bfloat16_follows_float32(tiny, expected):
  config = tiny.config(compute_dtype="bfloat16")
  mesh = tiny.mesh(fsdp=2, ring=2, tensor=2)
  sums, gradients = tiny.loss_and_gradients(config, mesh, "zigzag", batch_of(tiny))
  tiny.assert_close(sums, expected[0], 1e-2)
  tiny.assert_close(gradients, expected[1], 5e-2)
