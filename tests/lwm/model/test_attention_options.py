"""Sliding windows and the soft cap of scores, against attention written out over a dense mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.errors import ConfigError
from lwm.model import decoder

WINDOW, BOTH = dict(sliding_window=5), dict(sliding_window=3, attention_soft_cap=0.7)
CASES = [
  (WINDOW, dict(ring=8), "zigzag"),
  (BOTH, dict(), "contiguous"),
  (BOTH, dict(ring=2, ulysses=2, tensor=2), "contiguous"),
]


def batch_of(tiny):
  rng = np.random.default_rng(5)
  rows = [[tiny.document(rng, 13, 0), tiny.document(rng, 10 + r, 1)] for r in range(2)]
  return tiny.pack(rows, 32)


def dense_attention(config, rules, intervals, layout):
  """Replaces the attention over the mesh on one device: all scores, and the mask as an array."""
  query_spec = rules.spec("batch", "sequence", "heads", "head_dim")
  rows = rules.spec("batch", "sequence")

  @functools.partial(
    jax.shard_map,
    in_specs=(query_spec, query_spec, query_spec, rows, rows),
    out_specs=query_spec,
    check_vma=False,
  )
  def attend(query_BxSxHxD, key_BxSxGxD, value_BxSxGxD, start_BxS, stop_BxS):
    S, H, D = query_BxSxHxD.shape[1:]
    key_1x1xS = jnp.arange(S)[None, None]
    query_1xSx1 = jnp.arange(S)[None, :, None]
    seen_BxSxS = (key_1x1xS >= start_BxS[..., None]) & (key_1x1xS < stop_BxS[..., None])
    if config.sliding_window is not None:
      seen_BxSxS &= key_1x1xS > query_1xSx1 - config.sliding_window
    repeats = H // key_BxSxGxD.shape[2]
    key_BxSxHxD = jnp.repeat(key_BxSxGxD, repeats, axis=2)
    value_BxSxHxD = jnp.repeat(value_BxSxGxD, repeats, axis=2)
    scores_BxHxSxS = jnp.einsum("bqhd,bkhd->bhqk", query_BxSxHxD, key_BxSxHxD) * D**-0.5
    if config.attention_soft_cap is not None:
      cap = config.attention_soft_cap
      scores_BxHxSxS = cap * jnp.tanh(scores_BxHxSxS / cap)
    weights_BxHxSxS = jnp.where(seen_BxSxS[:, None], jnp.exp(scores_BxHxSxS), 0)
    total_BxHxSx1 = weights_BxHxSxS.sum(axis=-1, keepdims=True)
    weights_BxHxSxS /= jnp.where(total_BxHxSx1 > 0, total_BxHxSx1, 1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights_BxHxSxS, value_BxSxHxD)

  return lambda query, key, value: (attend(query, key, value, *intervals), None)


@pytest.fixture(scope="module")
def plain(tiny):
  """Losses and gradients without an option."""
  return tiny.loss_and_gradients(tiny.config(), tiny.mesh(), "contiguous", batch_of(tiny))


@pytest.fixture(scope="module")
def dense(tiny, plain):
  """Losses and gradients with dense attention, by the options."""

  @functools.cache
  def compute(options):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(decoder, "attend_over_mesh", dense_attention)
      config = tiny.config(**dict(options))
      expected = tiny.loss_and_gradients(config, tiny.mesh(), "contiguous", batch_of(tiny))
    assert np.abs(expected[0].nll / plain[0].nll - 1).max() > 1e-3, "the option changes nothing"
    return expected

  return compute


@pytest.mark.slow
@pytest.mark.parametrize("options,sizes,kind", CASES, ids=str)
def test_losses_and_gradients_equal_dense_attention(tiny, dense, options, sizes, kind):
  config = tiny.config(**options)
  actual = tiny.loss_and_gradients(config, tiny.mesh(**sizes), kind, batch_of(tiny))
  tiny.assert_close(actual, dense(tuple(options.items())), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("same", [dict(sliding_window=32), dict(attention_backend="xla")], ids=str)
def test_a_window_of_the_sequence_and_the_default_backend_change_nothing(tiny, plain, same):
  config = tiny.config(**same)
  actual = tiny.loss_and_gradients(config, tiny.mesh(), "contiguous", batch_of(tiny))
  jax.tree.map(np.testing.assert_array_equal, actual, plain)


@pytest.mark.parametrize(
  "name,reason",
  [
    ("fast", "There is no attention backend 'fast'"),
    ("mosaic_gpu", "'mosaic_gpu' cannot run this"),
  ],
)
def test_a_backend_that_cannot_run_is_one_sentence(tiny, name, reason):
  config = tiny.config(attention_backend=name)
  with pytest.raises(ConfigError, match=f"config.model.attention_backend: .*{reason}"):
    tiny.loss_and_gradients(config, tiny.mesh(), "contiguous", batch_of(tiny))
