"""Linear cross-entropy against SciPy in float64 and the reference, sharded, and its memory.

N tokens, M model width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import PartitionSpec as P

from kernels.cross_entropy import linear_cross_entropy, xla

TEXT, VISION = 40, 150
ONE = ((0, TEXT + VISION),)
TWO = ((0, TEXT), (TEXT, TEXT + VISION))
GAPS = ((7, 31), (100, 190))
AXES = ("data", "fsdp", "ring", "tensor")


def make_inputs(num_tokens, dtype=jnp.float32, width=24, seed=0):
  rng = np.random.default_rng(seed)
  hidden_NxM = jnp.asarray(rng.normal(size=(num_tokens, width)), dtype)
  head_MxV = jnp.asarray(rng.normal(size=(width, TEXT + VISION)), jnp.float32)
  targets_N = rng.integers(0, TEXT + VISION, num_tokens)
  targets_N[: num_tokens // 3] %= TEXT
  targets_N[rng.random(num_tokens) < 0.2] = -1
  return hidden_NxM, head_MxV, jnp.asarray(targets_N, jnp.int32)


def judge(hidden_NxM, head_MxV, targets_N, ranges):
  """Log-probabilities and log-sum-exps in float64, token by token."""
  logits_NxV = np.asarray(hidden_NxM, np.float64) @ np.asarray(head_MxV, np.float64)
  log_probability_N, log_sum_exp_N = np.zeros((2, len(targets_N)))
  for i, target in enumerate(np.asarray(targets_N)):
    for start, stop in ranges:
      if start <= target < stop:
        own_V = logits_NxV[i, start:stop]
        log_probability_N[i] = scipy.special.log_softmax(own_V)[target - start]
        log_sum_exp_N[i] = scipy.special.logsumexp(own_V)
  return log_probability_N, log_sum_exp_N


def weighted(inputs, weights_N, ranges, **options):
  """A weighted sum of all outputs, and its gradients."""
  hidden_NxM, head_MxV, targets_N = inputs

  def scalar(hidden_NxM, head_MxV):
    out = linear_cross_entropy(hidden_NxM, head_MxV, targets_N, ranges=ranges, **options)
    return (weights_N * (out.loss_N + 0.3 * out.log_sum_exp_N)).sum(), out

  return jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(hidden_NxM, head_MxV)


def assert_close(actual, expected, tolerance):
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
    np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1.0, np.abs(e).max()))


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("ranges", [ONE, TWO], ids=["one", "two"])
def test_equals_scipy(backend, ranges):
  inputs = make_inputs(77)
  out = linear_cross_entropy(
    *inputs, ranges=ranges, chunk=16, vocab_block=64, z_loss=1e-2, backend=backend
  )
  log_probability_N, log_sum_exp_N = judge(*inputs, ranges)
  assert_close(out.log_probability_N, log_probability_N, 1e-6)
  assert_close(out.log_sum_exp_N, log_sum_exp_N, 1e-6)
  assert_close(out.loss_N, 1e-2 * log_sum_exp_N**2 - log_probability_N, 1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize(
  "ranges, num_tokens, chunk, vocab_block",
  [(ONE, 77, 16, 50), (TWO, 77, 16, 50), (TWO, 64, 64, 128), (GAPS, 5, 32, 4096)],
  ids=["one", "two", "exact", "gaps"],
)
def test_equals_reference_with_gradients(ranges, num_tokens, chunk, vocab_block, dtype, tolerance):
  inputs = make_inputs(num_tokens, dtype)
  weights_N = jnp.linspace(-1, 2, num_tokens)
  expected = weighted(inputs, weights_N, ranges, z_loss=1e-2, backend="reference")
  actual = weighted(inputs, weights_N, ranges, z_loss=1e-2, chunk=chunk, vocab_block=vocab_block)
  assert_close(actual, expected, tolerance)
  assert actual[1][0].dtype == dtype and actual[1][1].dtype == jnp.float32


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_gradient_equals_closed_form(backend):
  hidden_NxM, head_MxV, targets_N = make_inputs(33)
  targets_N = jnp.abs(targets_N)
  (_, _), (hidden_gradient, head_gradient) = weighted(
    (hidden_NxM, head_MxV, targets_N), jnp.ones(33), ONE, chunk=8, vocab_block=64, backend=backend
  )
  hidden, head = np.asarray(hidden_NxM, np.float64), np.asarray(head_MxV, np.float64)
  logits_gradient = 1.3 * scipy.special.softmax(hidden @ head, axis=1)
  logits_gradient[np.arange(33), targets_N] -= 1
  assert_close(hidden_gradient, logits_gradient @ head.T, 2e-6)
  assert_close(head_gradient, hidden.T @ logits_gradient, 2e-6)


def test_tokens_without_loss_give_zero_and_no_nan():
  hidden_NxM, head_MxV, _ = make_inputs(20)
  hidden_NxM = hidden_NxM.at[10:].set(jnp.nan)  # What padding holds must not matter.
  targets_N = jnp.arange(20).at[10:].set(-1)
  (_, out), gradients = weighted((hidden_NxM, head_MxV, targets_N), jnp.ones(20), TWO, chunk=16)
  assert all(not np.asarray(x)[10:].any() for x in out)
  assert not np.asarray(gradients[0])[10:].any()
  (_, short), short_gradients = weighted(
    (hidden_NxM[:10], head_MxV, targets_N[:10]), jnp.ones(10), TWO, chunk=16
  )
  assert_close([x[:10] for x in out], short, 1e-6)
  assert_close(gradients[1], short_gradients[1], 1e-6)


def test_large_logits_do_not_overflow():
  hidden_NxM, head_MxV, targets_N = make_inputs(40)
  inputs = hidden_NxM * 300, head_MxV, targets_N
  (_, out), gradients = weighted(inputs, jnp.ones(40), TWO, chunk=16, vocab_block=64)
  log_probability_N, _ = judge(*inputs, TWO)
  assert_close(out.log_probability_N, log_probability_N, 1e-6)
  assert all(np.isfinite(np.asarray(x)).all() for x in gradients)


@pytest.mark.parametrize(
  "text, vision, expected", [(0, 0, 0), (33, 0, 3), (0, 16, 2), (17, 1, 2 + 2)], ids=str
)
def test_work_is_that_of_the_tokens_and_ranges_present(text, vision, expected):
  """Chunks of 16 tokens; one block covers the text columns, two cover the vision columns."""
  targets_N = np.full(64, -1)
  places = np.random.default_rng(0).permutation(64)
  targets_N[places[:text]] = TEXT - 1
  targets_N[places[text : text + vision]] = TEXT
  order = xla._Order(jnp.asarray(targets_N), TWO, 16)
  count = xla._visit_chunks(
    lambda tokens, blocks, count: count + blocks.count, 0, order, TEXT + VISION, 0, 100
  )
  assert count == expected


@pytest.mark.parametrize(
  "shape, ranges, dtype, tolerance",
  [
    ((1, 1, 1, 8), TWO, jnp.float32, 2e-6),
    ((2, 1, 2, 2), ONE, jnp.float32, 2e-6),
    ((2, 1, 2, 2), TWO, jnp.bfloat16, 1.5e-2),
    ((1, 2, 4, 1), TWO, jnp.float32, 2e-6),
  ],
  ids=str,
)
def test_sharded_equals_reference(shape, ranges, dtype, tolerance):
  batch, sequence, width, vocab = 4, 24, 24, TEXT + VISION + 2  # 192 divides by 8.
  rng = np.random.default_rng(1)
  hidden_BxSxM = jnp.asarray(rng.normal(size=(batch, sequence, width)), dtype)
  head_MxV = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
  targets_BxS = rng.integers(0, TEXT + VISION, (batch, sequence))
  targets_BxS[0] %= TEXT  # Shards differ in the chunks that they visit.
  targets_BxS[rng.random((batch, sequence)) < 0.2] = -1
  weights_BxS = jnp.asarray(rng.normal(size=(batch, sequence)), jnp.float32)

  def scalar(backend, axis_name, hidden_BxSxM, head_MxV, targets_BxS, weights_BxS):
    out = linear_cross_entropy(
      hidden_BxSxM.reshape(-1, width),
      head_MxV,
      targets_BxS.reshape(-1),
      ranges=ranges,
      chunk=16,
      vocab_block=64,
      z_loss=1e-2,
      axis_name=axis_name,
      backend=backend,
    )
    return (weights_BxS.reshape(-1) * out.loss_N).sum()

  inputs = hidden_BxSxM, head_MxV, jnp.asarray(targets_BxS, jnp.int32), weights_BxS
  expected = jax.value_and_grad(functools.partial(scalar, "reference", None), (0, 1))(*inputs)

  mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 4)
  tokens = P(("data", "fsdp"), "ring")
  specs = tokens, P(None, "tensor"), tokens, tokens

  def sharded_scalar(*inputs):
    def body(*inputs):
      return jax.lax.psum(scalar("xla", "tensor", *inputs), ("data", "fsdp", "ring"))

    return jax.shard_map(body, in_specs=specs, out_specs=P())(*inputs)

  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip(inputs, specs)]
    compiled = jax.jit(jax.value_and_grad(sharded_scalar, (0, 1))).lower(*placed).compile()
    actual = compiled(*placed)
  assert_close(actual, expected, tolerance)
  for gradient, value in zip(actual[1], placed):
    assert gradient.sharding.is_equivalent_to(value.sharding, value.ndim)
  assert "all-gather" not in compiled.as_text()


def temporary_bytes(num_tokens, vocab, width=64):
  def scalar(hidden_NxM, head_MxV, targets_N):
    return linear_cross_entropy(hidden_NxM, head_MxV, targets_N, ranges=((0, vocab),)).loss_N.mean()

  shapes = (
    jax.ShapeDtypeStruct((num_tokens, width), jnp.float32),
    jax.ShapeDtypeStruct((width, vocab), jnp.float32),
    jax.ShapeDtypeStruct((num_tokens,), jnp.int32),
  )
  compiled = jax.jit(jax.value_and_grad(scalar, (0, 1))).lower(*shapes).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_hold_logits():
  base = temporary_bytes(65536, 32000)
  assert base < 65536 * 32000 * 4 / 50
  wide, long = temporary_bytes(65536, 64000), temporary_bytes(131072, 32000)
  # Twice the vocabulary may add copies of the head, twice the tokens of the hidden states.
  assert wide - base <= 2 * 32000 * 64 * 4
  assert long - base <= 2 * 65536 * 64 * 4


def test_unknown_backend_is_refused():
  with pytest.raises(ValueError, match="backend 'fast'"):
    linear_cross_entropy(*make_inputs(4), ranges=ONE, backend="fast")
