"""The memory, work and rematerialisation of the blockwise backend."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import SAVED_NAMES, KeyIntervals, attention, causal, xla
from tests.kernels import attention_cases


def random_inputs(B, S, H=2, G=1, D=8):
  random = np.random.default_rng(0)
  return tuple(
    jnp.asarray(random.standard_normal((B, S, heads, D)), "float32") for heads in (H, G, G)
  )


def total(query, key, value, intervals):
  return jnp.sum(attention(query, key, value, intervals, backend="xla")[0] ** 2)


def test_memory_is_linear_in_the_sequence():
  """The temporaries of the compiled gradient at 65536 tokens are four times those at 16384."""

  def temporaries(S):
    shapes = [jax.ShapeDtypeStruct((1, S, heads, 16), jnp.float32) for heads in (2, 1, 1)]
    grad = jax.jit(jax.grad(lambda q, k, v: total(q, k, v, causal(1, S)), argnums=(0, 1, 2)))
    return grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  short, long = temporaries(16384), temporaries(65536)
  assert long < 4.1 * short
  # Two float32 copies of query, key, value, out and their gradients would be 67 MB;
  # one score matrix of one head is 17 GB.
  assert long < 100e6


def loads(monkeypatch, intervals, S):
  """How often a forward pass loads each (batch row, key block)."""
  counts = collections.Counter()

  def counted(array, row, index, k):
    jax.debug.callback(lambda row, index: counts.update([(int(row), int(index))]), row, index)
    return load(array, row, index, k)

  load = xla._load
  monkeypatch.setattr(xla, "_load", counted)
  monkeypatch.setattr(xla, "QUERY_BLOCK", 8)
  monkeypatch.setattr(xla, "KEY_BLOCK", 8)
  jax.block_until_ready(attention(*random_inputs(len(intervals[0]), S), intervals, backend="xla"))
  jax.effects_barrier()
  return {block: count // 2 for block, count in counts.items()}


def test_only_blocks_that_meet_an_interval_are_loaded(monkeypatch):
  """Row 0 is causal, row 1 has two documents, row 2 a window of 8, row 3 is empty; blocks of 8."""
  S = 64
  start, stop = (np.tile(array, (4, 1)) for array in attention_cases.causal(1, S, S))
  start[1, 32:] = 32
  start[2] = np.maximum(stop[2] - 8, 0)
  stop[3] = 0
  counts = loads(monkeypatch, KeyIntervals(start, stop), S)
  expected = {(0, block): 8 - block for block in range(8)}
  expected |= {(1, block): 4 - block % 4 for block in range(8)}
  expected |= {(2, block): min(2, 8 - block) for block in range(8)}
  assert counts == expected


@pytest.mark.parametrize("part, passes", ((total, 1), (jax.grad(total, argnums=(0, 1, 2)), 2)))
def test_full_blocks_take_no_mask(monkeypatch, part, passes):
  """Only the 8 diagonal blocks of 36 causal ones take a mask, and both ends of a window of 29."""
  masked = []

  def counted(intervals, index, k, *, keys_first):
    jax.debug.callback(lambda index: masked.append(int(index)), index)
    return is_seen(intervals, index, k, keys_first=keys_first)

  is_seen = xla._is_seen
  monkeypatch.setattr(xla, "_is_seen", counted)
  monkeypatch.setattr(xla, "QUERY_BLOCK", 8)
  monkeypatch.setattr(xla, "KEY_BLOCK", 8)
  start, stop = causal(2, 64)
  start = start.at[1].set(jnp.maximum(stop[1] - 29, 0))
  jax.block_until_ready(part(*random_inputs(2, 64), KeyIntervals(start, stop)))
  jax.effects_barrier()
  # Query block n of the window sees keys from 8 n - 28 on, and whole blocks from 8 n - 21 on.
  causal_blocks = list(range(8))
  ends = [block for n in range(8) for block in (n - 4, n - 3) if block >= 0]
  assert sorted(masked) == sorted(passes * (2 * causal_blocks + ends))


@pytest.mark.parametrize("num_queries", (1, 1024))
def test_keys_outside_every_interval_are_not_read(num_queries):
  """If such a block were computed, its NaN would reach the output as 0 * NaN."""
  B, S = 2, 1024
  query, key, value = random_inputs(B, S)
  query = query[:, :num_queries]
  shape = (B, num_queries)
  window = KeyIntervals(jnp.full(shape, 512), jnp.full(shape, 700))
  poisoned = (jnp.arange(S) < 512)[:, None, None] | (jnp.arange(S) >= 768)[:, None, None]
  poison = functools.partial(jnp.where, poisoned, jnp.nan)
  grad = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
  clean, dirty = grad(query, key, value, window), grad(query, poison(key), poison(value), window)
  for clean_grad, dirty_grad in zip(clean, dirty):
    np.testing.assert_array_equal(clean_grad, dirty_grad)


def test_decoding_copies_no_cache():
  """A single query block reads the cache in place, with temporaries of one block at any size."""
  shapes = [(4, 1, 4, 32), (4, 16384, 2, 32), (4, 16384, 2, 32), (4, 1), (4, 1)]
  query, key, value, *intervals = (
    jax.ShapeDtypeStruct(shape, jnp.float32 if len(shape) == 4 else jnp.int32) for shape in shapes
  )
  step = jax.jit(functools.partial(attention, backend="xla"))
  compiled = step.lower(query, key, value, KeyIntervals(*intervals)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 1e6 < key.size


def test_a_remat_policy_that_saves_the_names_needs_no_second_forward():
  inputs = random_inputs(1, 16)

  def count(wrap):
    loss = wrap(lambda query, key, value: total(query, key, value, causal(1, 16)))
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)
    return attention_cases.exponentials(program.jaxpr)

  policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
  plain = count(lambda loss: loss)
  assert count(functools.partial(jax.checkpoint, policy=policy)) == plain < count(jax.checkpoint)


@pytest.mark.parametrize("length, block", ((1, 1), (256, 256), (257, 129), (520, 174), (4096, 256)))
def test_blocks_are_equal_and_leave_little_padding(length, block):
  assert xla._block(length, 256) == block
  assert -(-length // block) * block - length < -(-length // 256)
