"""One suite for every backend of the grouped product: values and gradients against float64.

E groups (experts), R rows, K inputs, N outputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.experts import grouped_matmul, xla

# Rows per group, and rows after the last group. K and N are no multiples of anything.
CASES = {
  "equal": ([16] * 4, 0),
  "empty": ([0, 21, 0, 0, 13, 0], 0),
  "one": ([0, 0, 37, 0], 0),
  "none": ([0, 0, 0], 9),
  "skewed": ([1, 1, 70, 2, 0, 3], 11),
  "many": ([3, 0, 1, 7, 5, 0, 0, 2, 9, 4, 1, 1, 6, 8, 2, 3], 5),
}
K, N = 24, 40
# Largest error of a group divided by the group's largest value. One operation rounds by 6e-8, 4e-3.
TOLERANCES = {"float32": 3e-6, "bfloat16": 1.5e-2}


@pytest.fixture(params=("reference", "xla", "ragged_dot"))
def backend(request):
  return request.param


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
  """Several blocks per case."""
  monkeypatch.setattr(xla, "BLOCK_ROWS", 16)


@pytest.fixture(autouse=True)
def no_silent_broadcast():
  with jax.numpy_rank_promotion("raise"):
    yield


@functools.cache
def arrays(case, dtype):
  """x, weights, sizes and the cotangent."""
  rng, (sizes, rest) = np.random.default_rng(0), CASES[case]
  num_rows = sum(sizes) + rest
  x = jnp.asarray(rng.normal(size=(num_rows, K)), dtype)
  weight = jnp.asarray(rng.normal(size=(len(sizes), K, N)), dtype)
  return (
    x,
    weight,
    jnp.asarray(sizes, jnp.int32),
    jnp.asarray(rng.normal(size=(num_rows, N)), dtype),
  )


@functools.cache
def judged(case, dtype):
  """The product and its gradients in float64."""
  x, weight, sizes, cotangent = (np.asarray(array, "float64") for array in arrays(case, dtype))
  out, x_grad, weight_grad = np.zeros(cotangent.shape), np.zeros(x.shape), np.zeros(weight.shape)
  begin = 0
  for group, size in enumerate(sizes.astype(int)):
    own = slice(begin, begin + size)
    out[own] = x[own] @ weight[group]
    x_grad[own] = cotangent[own] @ weight[group].T
    weight_grad[group] = x[own].T @ cotangent[own]
    begin += size
  return out, x_grad, weight_grad


def by_group(array, sizes):
  """The rows of each group, and the rest."""
  return np.split(array, np.cumsum(sizes))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, backend):
  x, weight, sizes, cotangent = arrays(case, dtype)

  @jax.jit
  def run(x, weight, cotangent):
    function = functools.partial(grouped_matmul, sizes_E=sizes, backend=backend)
    out, pull_back = jax.vjp(function, x, weight)
    return out, *pull_back(cotangent)

  out, x_grad, weight_grad = run(x, weight, cotangent)
  assert out.dtype == x_grad.dtype == weight_grad.dtype == dtype
  expected_out, expected_x_grad, expected_weight_grad = judged(case, dtype)
  pairs = [
    *zip(by_group(np.asarray(out), sizes), by_group(expected_out, sizes)),
    *zip(by_group(np.asarray(x_grad), sizes), by_group(expected_x_grad, sizes)),
    *zip(np.asarray(weight_grad), expected_weight_grad),
  ]
  for index, (actual, expected) in enumerate(pairs):
    actual = actual.astype("float64")
    if not expected.any():
      assert not actual.any(), index
    else:
      assert np.abs(actual - expected).max() / np.abs(expected).max() < TOLERANCES[dtype], index


def test_wrong_arguments_are_refused():
  x, weight, sizes, _ = arrays("equal", "float32")
  for arguments, message in (
    ((x[:, 1:], weight, sizes), r"\[E, K, N\]"),
    ((x, weight, sizes[1:]), r"int32 sizes of shape \(4,\)"),
    ((x, weight.astype(jnp.bfloat16), sizes), "float32 and bfloat16: cast them"),
  ):
    with pytest.raises(ValueError, match=message):
      grouped_matmul(*arguments)
  with pytest.raises(ValueError, match="use one of"):
    grouped_matmul(x, weight, sizes, backend="fast")
