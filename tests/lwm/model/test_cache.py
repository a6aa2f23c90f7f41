"""Decoding with a cache gives the logits of a full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import KeyIntervals
from kernels.ring import Layout
from lwm.config.model import AdapterConfig
from lwm.model import build
from lwm.parallel.sharding import ShardingRules

LAYOUT = Layout("contiguous", 1)
LENGTHS = (11, 8)


# Settings of the model, and tokens of the prompt; a long one is read by another kernel. The
# first row's first vision id comes after the prompt; the second row has one in the prompt.
CASES = [
  (dict(attention_bias=True, query_key_norm=True), 6),
  (dict(sliding_window=4, attention_soft_cap=0.5, adapter=AdapterConfig(3, temperature=0.2)), 9),
]


def full_logits(tiny, config, tokens):
  """Logits of every token of a row [S], computed without other rows."""
  model, mesh = build(config), tiny.mesh()

  @tiny.jit
  def logits(params, tokens):
    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    intervals = KeyIntervals(jnp.zeros_like(position), position + 1)
    hidden = model.hidden(
      params, tokens, position, intervals, rope_theta=tiny.rope_theta, layout=LAYOUT
    )
    return model.logits(params, hidden)

  with jax.set_mesh(mesh):
    return np.asarray(logits(tiny.init(model, mesh), tokens[None]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("options,prompt", CASES, ids=str)
@pytest.mark.parametrize(
  "sizes", [dict(), dict(data=2, fsdp=1, tensor=2), dict(ring=2, ulysses=2, tensor=2)], ids=str
)
def test_cached_decode_equals_full_forward(tiny, sizes, options, prompt):
  """Rows of different lengths, padded on the left: a whole prompt, then one token at a time."""
  config = tiny.config(**options)
  rng = np.random.default_rng(6)
  rows = [rng.integers(0, 64, length).astype(np.int32) for length in LENGTHS]
  rows[0][:prompt] %= config.text_vocab_size
  padding = max(LENGTHS) - np.array(LENGTHS, np.int32)
  tokens = np.stack([np.pad(row, (pad, 0)) for row, pad in zip(rows, padding)])
  rules = ShardingRules(sequence=None, cache=("ring", "ulysses") if "ring" in sizes else ())
  model, mesh = build(config, rules), tiny.mesh(**sizes)
  decode = tiny.jit(
    lambda params, tokens, cache: model.decode(params, tokens, cache, rope_theta=tiny.rope_theta)
  )
  with jax.set_mesh(mesh):
    params = tiny.init(model, mesh)
    cache = model.init_cache(2, 16, padding)
    steps, at = [], 0
    for count in (prompt, *[1] * (max(LENGTHS) - prompt)):
      logits, cache = decode(params, tokens[:, at : at + count], cache)
      at += count
      steps.append((at, np.asarray(logits)))
  assert at == max(LENGTHS) and int(cache.length) == at
  for r, row in enumerate(rows):
    expected = full_logits(tiny, config, row)
    for column, logits in steps:
      np.testing.assert_allclose(logits[r], expected[column - 1 - padding[r]], rtol=1e-5, atol=1e-5)
