"""Sliding windows and the soft cap of scores, against attention written out over a dense mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.model import decoder

OPTIONS = [
  dict(sliding_window=5),
  dict(attention_soft_cap=0.5),
  dict(sliding_window=3, attention_soft_cap=0.7),
]
MESHES = [
  (dict(), "contiguous"),
  (dict(ring=8), "zigzag"),
  (dict(ring=2, ulysses=4), "contiguous"),
  (dict(fsdp=2, ring=2, tensor=2), "zigzag"),
]


def batch_of(tiny):
  rng = np.random.default_rng(5)
  rows = [[tiny.document(rng, 13, 0), tiny.document(rng, 10 + r, 1)] for r in range(2)]
  return tiny.pack(rows, 32)


def dense_attention(config, rules, intervals, layout):
  """Replaces the attention over the mesh on one device: all scores, and the mask as an array."""
  del rules, layout
  start_BxQx1, stop_BxQx1 = (array_BxQ[..., None] for array_BxQ in intervals)
  key_1x1xK = jnp.arange(intervals.stop_BxQ.shape[1])[None, None]
  seen_BxQxK = (key_1x1xK >= start_BxQx1) & (key_1x1xK < stop_BxQx1)
  if config.sliding_window is not None:
    query_1xQx1 = jnp.arange(intervals.stop_BxQ.shape[1])[None, :, None]
    seen_BxQxK &= key_1x1xK > query_1xQx1 - config.sliding_window

  def attend(query, key, value):
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(array, repeats, axis=2) for array in (key, value))
    scores_BxHxQxK = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    if config.attention_soft_cap is not None:
      cap = config.attention_soft_cap
      scores_BxHxQxK = cap * jnp.tanh(scores_BxHxQxK / cap)
    weights_BxHxQxK = jnp.where(seen_BxQxK[:, None], jnp.exp(scores_BxHxQxK), 0)
    total_BxHxQx1 = weights_BxHxQxK.sum(axis=-1, keepdims=True)
    weights_BxHxQxK /= jnp.where(total_BxHxQx1 > 0, total_BxHxQx1, 1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights_BxHxQxK, value), None

  return attend


@pytest.fixture(scope="module", params=OPTIONS, ids=str)
def options_and_expected(request, tiny):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(decoder, "_attend_over_mesh", dense_attention)
    expected, plain = (
      tiny.loss_and_gradients(tiny.config(**options), tiny.mesh(), "contiguous", batch_of(tiny))
      for options in (request.param, {})
    )
  assert np.abs(expected[0].nll / plain[0].nll - 1).max() > 1e-3, "the option changes nothing"
  return request.param, expected


@pytest.mark.parametrize("sizes,kind", MESHES, ids=str)
def test_losses_and_gradients_equal_dense_attention(tiny, options_and_expected, sizes, kind):
  options, expected = options_and_expected
  config = tiny.config(**options)
  actual = tiny.loss_and_gradients(config, tiny.mesh(**sizes), kind, batch_of(tiny))
  tiny.assert_close(actual, expected, 1e-5)


def test_a_window_of_the_sequence_changes_nothing(tiny):
  whole, none = (
    tiny.loss_and_gradients(
      tiny.config(sliding_window=window), tiny.mesh(), "contiguous", batch_of(tiny)
    )
    for window in (32, None)
  )
  jax.tree.map(np.testing.assert_array_equal, whole, none)
