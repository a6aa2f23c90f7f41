"""Counts of the blocks that each device of a ring computes."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import KeyIntervals, causal, mask, packed
from kernels.ring import Layout, blocks_per_device
from tests.kernels import attention_cases

S = 32 * 1024


def busiest(kind, intervals, ring_size=8, block=256):
  return blocks_per_device(intervals, Layout(kind, ring_size), block).max()


@pytest.mark.parametrize("kind", ("contiguous", "zigzag"))
@pytest.mark.parametrize("name", ("causal", "packed", "sliding_window", "frames", "empty_rows"))
def test_counts_are_those_of_the_mask(name, kind):
  """Compares with the mask. In these cases the blocks that meet are contiguous."""
  intervals = KeyIntervals(*map(jnp.asarray, getattr(attention_cases, name)(2, 64, 64)))
  layout = Layout(kind, 4)
  permutation = layout.permutation(64)
  seen = np.asarray(mask(intervals, 64))[:, permutation][:, :, permutation]
  blocks = seen.reshape(2, 16, 4, 16, 4).any(axis=(2, 4))
  expected = blocks.reshape(2, 4, 4, 16).sum(axis=(0, 2, 3))
  np.testing.assert_array_equal(blocks_per_device(intervals, layout, 4), expected)


def test_zigzag_halves_the_busiest_device_of_a_causal_ring():
  """The ideal is 1 / (2 - 1 / 8) = 0.53 of the contiguous layout."""
  assert busiest("zigzag", causal(1, S)) <= 0.57 * busiest("contiguous", causal(1, S))


@pytest.mark.parametrize("kind", ("contiguous", "zigzag"))
def test_packed_documents_of_2k_are_a_sixteenth_of_one_document(kind):
  """2K x 2K / 2 per 2K tokens is 1/16 of 32K x 32K / 2; blocks at the boundaries add to it."""
  documents = packed(jnp.arange(S)[None] // 2048 + 1)
  one = blocks_per_device(causal(1, S), Layout(kind, 8), 256)
  assert busiest(kind, documents) <= 0.08 * one.mean()


def test_skipping_saves_almost_half_of_a_zigzag_ring():
  everything = (S // 256) ** 2 / 8
  assert busiest("zigzag", causal(1, S)) <= 0.51 * everything
