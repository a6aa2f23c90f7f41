"""The chunked feed-forward network against NumPy and the reference, sharded, and its memory.

B batch, S sequence length, M model width, F feed-forward width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.feed_forward import feed_forward, reference

AXES = ("data", "fsdp", "ring", "tensor")


def make_inputs(batch, length, dtype=jnp.float32, width=16, hidden=48):
  rng = np.random.default_rng(0)
  x_BxSxM = jnp.asarray(rng.normal(size=(batch, length, width)), dtype)
  shapes = (width, hidden), (width, hidden), (hidden, width)
  return x_BxSxM, *(jnp.asarray(0.2 * rng.normal(size=shape), dtype) for shape in shapes)


def gradients(function, inputs, weights_BxSxM):
  """The result of a function, and the gradients of a weighted sum of it."""
  out, transpose = jax.jit(lambda *inputs: jax.vjp(function, *inputs))(*inputs)
  return out, transpose(weights_BxSxM.astype(out.dtype))


def assert_close(actual, expected, tolerance):
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.dtype == e.dtype
    a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
    np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


def cotangent(x_BxSxM):
  return jnp.asarray(np.random.default_rng(1).normal(size=x_BxSxM.shape), jnp.float32)


def test_equals_numpy():
  inputs = make_inputs(2, 13)
  x, gate, up, down = (np.asarray(array, np.float64) for array in inputs)
  expected = ((x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down
  for chunk in (4, 16):
    out = np.asarray(feed_forward(*inputs, chunk=chunk))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("length, chunk", [(16, 4), (13, 4), (7, 100)])
def test_equals_reference_with_gradients(length, chunk, dtype, tolerance):
  inputs = make_inputs(2, length, dtype)
  weights_BxSxM = cotangent(inputs[0])
  expected = gradients(reference.feed_forward, inputs, weights_BxSxM)
  actual = gradients(functools.partial(feed_forward, chunk=chunk), inputs, weights_BxSxM)
  assert_close(actual, expected, tolerance)


def test_weight_gradient_of_many_chunks_keeps_its_precision():
  """Adding 1024 chunks in bfloat16 would lose a fifth of the gradient."""
  x, *weights = make_inputs(1, 2048, jnp.bfloat16)
  x = jnp.abs(x)
  ones = jnp.ones(x.shape, jnp.bfloat16)
  exact = gradients(reference.feed_forward, [a.astype(jnp.float32) for a in (x, *weights)], ones)[
    1
  ][3]
  actual = gradients(functools.partial(feed_forward, chunk=2), (x, *weights), ones)[1][3]
  error = np.abs(np.asarray(actual, np.float32) - exact).max() / np.abs(exact).max()
  assert error < 0.01


@pytest.mark.parametrize("has_part_of_tokens", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 1, 2, 2), (1, 2, 4, 1)], ids=str)
def test_sharded_equals_reference(shape, has_part_of_tokens):
  """Chunks of four tokens. One case has three tokens per device, fewer than chunks."""
  inputs = make_inputs(4, 24)
  weights_BxSxM = cotangent(inputs[0])
  expected = gradients(reference.feed_forward, inputs, weights_BxSxM)
  mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 4)
  tokens = P(("data", "fsdp"), ("ring", "tensor") if has_part_of_tokens else "ring", None)
  specs = tokens, P(None, "tensor"), P(None, "tensor"), P("tensor", None)
  with jax.set_mesh(mesh):
    sharded = jax.shard_map(
      functools.partial(
        feed_forward, chunk=4, axis_name="tensor", has_part_of_tokens=has_part_of_tokens
      ),
      in_specs=specs,
      out_specs=tokens,
    )
    place = lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec))
    placed = [place(array, spec) for array, spec in zip(inputs, specs)]
    actual = gradients(sharded, placed, place(weights_BxSxM, tokens))
  assert_close(actual, expected, 1e-6)
  for gradient, array in zip(actual[1], placed):
    assert gradient.sharding.is_equivalent_to(array.sharding, array.ndim)


def test_memory_does_not_hold_the_intermediate():
  def temporary_bytes(length, hidden):
    width = 64
    shapes = [(1, length, width), (width, hidden), (width, hidden), (hidden, width)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    scalar = lambda *inputs: feed_forward(*inputs, chunk=256).sum()
    compiled = jax.jit(jax.value_and_grad(scalar, (0, 1, 2, 3))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  base, wide, long = (
    temporary_bytes(16384, 1024),
    temporary_bytes(16384, 2048),
    temporary_bytes(32768, 1024),
  )
  assert base < 16384 * 1024 * 4 / 2
  # Twice the width adds to each chunk's intermediates; twice the sequence adds copies of x.
  assert wide - base < 16384 * 1024 * 4 / 4
  assert long - base <= 4 * 16384 * 64 * 4
