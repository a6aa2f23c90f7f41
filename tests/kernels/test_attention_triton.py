"""The Triton backend: its kernels in Triton's interpreter, against the judge."""

# isort: off
from tests.kernels import triton_interpreter  # First: it chooses the interpreter.
# isort: on

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
import pytest

from kernels.attention import backend as backend_lib
from kernels.attention.intervals import KeyIntervals
from kernels.attention.triton import TRITON, backend as triton_backend
from kernels.attention.triton.block_sizes import Blocks
from tests.kernels import attention_cases
from tests.kernels.attention_cases import CASES, Case

TOLERANCES = {"float32": 3e-6, "bfloat16": 2e-2, "float16": 2e-3}
SMALL_BLOCKS = Blocks(16, 16, num_warps=4, num_stages=2)
NAMES = ("out", "log_sum_exp", "query gradient", "key gradient", "value gradient")
WIDE = Case("head_dim_64", attention_cases.packed, B=1, Q=40, K=40, H=2, G=1, D=64)
NOTHING = Case("nothing", lambda B, Q, K: 2 * (np.zeros((B, Q), np.int32),), B=1)
# Other cases find what these find, and the interpreter takes seconds for each.
SLOW = ("frames", "bidirectional", "sizes_divide_blocks", "multi_head", "decode_one")
PARAMETERS = [
  pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name in SLOW else [])
  for case in (*CASES, WIDE, NOTHING)
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Makes blocks so small that most cases have full, masked and skipped ones."""
  monkeypatch.setattr(jax_triton, "triton_call", triton_interpreter.triton_call)
  monkeypatch.setattr(triton_backend, "_blocks", lambda *_: SMALL_BLOCKS)


def results_and_gradients(case, dtype):
  """What `attention_cases.judge` returns, from the backend and from the judge."""
  query, key, value, intervals, *cotangents = case.arrays()
  arrays = [jnp.asarray(array, dtype) for array in (query, key, value)]
  pairs = KeyIntervals(*map(jnp.asarray, intervals))
  cotangents = jnp.asarray(cotangents[0], dtype), jnp.asarray(cotangents[1], "float32")
  options = dict(scale=case.D**-0.5, soft_cap=case.soft_cap)
  results = triton_backend.forward(*arrays, pairs, **options, out_dtype=arrays[0].dtype)
  delta = backend_lib.delta(*results, *cotangents)
  grads = TRITON.gradients(*arrays, pairs, results[1], delta, cotangents[0], **options)
  exact = [np.asarray(array, "float64") for array in (*arrays, *cotangents)]
  expected = attention_cases.judge(*exact[:3], intervals, *exact[3:], soft_cap=case.soft_cap)
  return (*results, *grads), expected


def check(case, dtype):
  actual, expected = results_and_gradients(case, dtype)
  assert [array.dtype for array in actual] == [dtype] + 4 * ["float32"]
  for name, array, wanted in zip(NAMES, actual, expected):
    array = np.asarray(array, "float64")
    is_finite = np.isfinite(wanted)
    np.testing.assert_array_equal(array[~is_finite], wanted[~is_finite], name)
    if is_finite.any():
      error = np.abs(array[is_finite] - wanted[is_finite]).max()
      assert error <= TOLERANCES[dtype] * np.abs(wanted[is_finite]).max(), name


@pytest.mark.parametrize("case", PARAMETERS)
def test_values_and_gradients(case):
  check(case, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("name", ("packed", "empty_rows", "soft_cap"))
def test_half_precision(name, dtype):
  check(next(case for case in CASES if case.name == name), dtype)


@pytest.mark.slow
def test_part_of_the_keys_given_statistics_over_all():
  """As in a ring, rows whose local interval is empty may have a finite log-sum-exp."""
  case = next(case for case in CASES if case.name == "causal")
  query, key, value, (start, stop), out_cotangent, _ = (
    jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), array) for array in case.arrays()
  )
  start, stop = start.astype(jnp.int32), stop.astype(jnp.int32)
  scale = case.D**-0.5
  options = dict(scale=scale, soft_cap=None)
  whole = KeyIntervals(start, stop)
  out, log_sum_exp = triton_backend.forward(
    query, key, value, whole, **options, out_dtype=jnp.float32
  )
  delta = backend_lib.delta(out, log_sum_exp, out_cotangent, jnp.zeros_like(log_sum_exp))
  rest = log_sum_exp, delta, out_cotangent
  wanted = TRITON.gradients(query, key, value, whole, *rest, **options)
  first = 20
  low = KeyIntervals(jnp.clip(start, 0, first), jnp.clip(stop, 0, first))
  high = KeyIntervals(jnp.clip(start - first, 0), jnp.clip(stop - first, 0))
  left = TRITON.gradients(query, key[:, :first], value[:, :first], low, *rest, **options)
  right = TRITON.gradients(query, key[:, first:], value[:, first:], high, *rest, **options)
  np.testing.assert_allclose(left[0] + right[0], wanted[0], atol=2e-6)
  for i in (1, 2):
    together = jnp.concatenate([left[i], right[i]], axis=1)
    np.testing.assert_allclose(together, wanted[i], atol=4e-6)


def test_only_blocks_that_meet_an_interval_are_visited(monkeypatch):
  """Counts matrix products: per pair of blocks two forward, and three and four backward."""
  counts = []
  create_dot = triton_interpreter.interpreter.InterpreterBuilder.create_dot

  def counting(*args):
    counts[-1] += 1
    return create_dot(*args)

  monkeypatch.setattr(triton_interpreter.interpreter.InterpreterBuilder, "create_dot", counting)
  S, D = 96, 8
  array = jnp.ones((1, S, 1, D))
  statistics = jnp.zeros((1, S, 1))
  index = np.arange(S, dtype=np.int32)[None]

  def products(start, stop):
    intervals = KeyIntervals(jnp.asarray(start), jnp.asarray(stop))
    options = dict(scale=1.0, soft_cap=None)
    counts.append(0)
    triton_backend.forward(array, array, array, intervals, out_dtype=jnp.float32, **options)
    counts.append(0)
    rest = statistics, statistics, array
    triton_backend.backward(array, array, array, intervals, *rest, **options)
    return counts[-2:]

  # Six query blocks of 16 and as many key blocks: block i of the queries meets i + 1 of the keys.
  causal_pairs, packed_pairs = 21, 6
  zeros = np.zeros_like(index)
  assert products(zeros, index + 1) == [2 * causal_pairs, (3 + 4) * causal_pairs]
  assert products(index // 16 * 16, index + 1) == [2 * packed_pairs, (3 + 4) * packed_pairs]
  assert products(zeros, zeros) == [0, 0]


def test_results_vary_over_the_axes_of_a_surrounding_shard_map(monkeypatch):
  """Zeros stand in for jax-triton's results, which do not say what they vary over either."""

  def triton_call(*args, out_type, **_):
    return jax.tree.map(lambda kind: jnp.zeros(kind.shape, kind.dtype), out_type)

  monkeypatch.setattr(jax_triton, "triton_call", triton_call)
  mesh = jax.make_mesh((2,), ("ring",), devices=jax.devices()[:2])
  spec = jax.P(None, "ring")

  def local(query, start, stop, statistics):
    intervals = KeyIntervals(start, stop)
    options = dict(scale=1.0, soft_cap=None)
    results = triton_backend.forward(
      query, query, query, intervals, out_dtype=jnp.float32, **options
    )
    grads = triton_backend.backward(
      query, query, query, intervals, statistics, statistics, query, **options
    )
    for result in (*results, *grads):
      assert jax.typeof(result).manual_axis_type.varying == {"ring"}
    return results[0]

  shapes = (((1, 64, 2, 64), "bfloat16"), ((1, 64), "int32"), ((1, 64), "int32"))
  shapes += (((1, 64, 2), "float32"),)
  sharding = jax.NamedSharding(mesh, spec)
  arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
  with jax.set_mesh(mesh):
    jax.eval_shape(jax.shard_map(local, in_specs=spec, out_specs=spec), *arguments)


def test_what_is_not_supported_is_said():
  query = jnp.zeros((1, 8, 2, 64))
  assert "NVIDIA GPU" in triton_backend.unsupported(query, query)
