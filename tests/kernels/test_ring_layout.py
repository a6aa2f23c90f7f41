"""Layouts: which tokens each shard holds."""

import jax
import numpy as np
import pytest

from kernels.ring import Layout


@pytest.mark.parametrize("kind", ("contiguous", "zigzag"))
@pytest.mark.parametrize("ring_size", (1, 2, 4, 8))
def test_chunk_offsets_describe_the_permutation(kind, ring_size):
  S = 48
  layout = Layout(kind, ring_size)
  length = layout.chunk_length(S)
  permutation = layout.permutation(S)
  assert permutation.dtype == np.int64
  np.testing.assert_array_equal(np.sort(permutation), np.arange(S))
  offsets = jax.jit(layout.chunk_offsets, static_argnums=1)
  for shard, columns in enumerate(np.split(permutation, ring_size)):
    expected = [np.arange(offset, offset + length) for offset in offsets(shard, S)]
    assert len(expected) == layout.chunks_per_shard
    np.testing.assert_array_equal(columns, np.concatenate(expected))


def test_zigzag_gives_every_shard_the_same_causal_work():
  """The work of a causal query is its index, so the work of a shard is the sum of its columns."""
  work = {
    kind: {columns.sum() for columns in np.split(Layout(kind, 8).permutation(64), 8)}
    for kind in ("contiguous", "zigzag")
  }
  assert len(work["zigzag"]) == 1 and len(work["contiguous"]) == 8


@pytest.mark.parametrize("kind", ("contiguous", "zigzag"))
def test_a_ring_of_one_is_not_permuted(kind):
  np.testing.assert_array_equal(Layout(kind, 1).permutation(7), np.arange(7))


@pytest.mark.parametrize("kind, length, chunks", (("contiguous", 46, 4), ("zigzag", 44, 8)))
def test_a_sequence_that_does_not_divide_is_refused(kind, length, chunks):
  with pytest.raises(ValueError, match=f"{length} tokens .* use a multiple of {chunks}"):
    Layout(kind, 4).permutation(length)
  with pytest.raises(ValueError, match=f"{length} tokens .* use a multiple of {chunks}"):
    Layout(kind, 4).chunk_offsets(0, length)


def test_an_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="use 'contiguous' or 'zigzag'"):
    Layout("striped", 4)


def test_equal_layouts_are_one_static_argument():
  assert hash(Layout("zigzag", 4)) == hash(Layout("zigzag", 4))
  assert Layout("zigzag", 4) == Layout("zigzag", 4) != Layout("contiguous", 4)
