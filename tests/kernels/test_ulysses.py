"""Ulysses x ring on eight CPU devices against attention over the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels.attention import KeyIntervals, attention, xla
from kernels.ring import Layout
from kernels.ulysses import ulysses_attention
from tests.kernels import attention_cases
from tests.kernels.attention_cases import Case

SEQUENCE = ("ring", "ulysses")
MASKS = ("causal", "packed", "sliding_window", "frames", "bidirectional", "empty_rows")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(xla, "QUERY_BLOCK", 16)
  monkeypatch.setattr(xla, "KEY_BLOCK", 16)


@pytest.fixture(autouse=True)
def no_silent_broadcast():
  with jax.numpy_rank_promotion("raise"):
    yield


def case_of(mask="packed", H=8, G=2, **changes):
  return Case(mask, getattr(attention_cases, mask), B=2, Q=64, K=64, H=H, G=G, **changes)


def inputs(case, dtype="float32"):
  query, key, value, intervals, *cotangents = case.arrays()
  arrays = [jnp.asarray(array, dtype) for array in (query, key, value, cotangents[0])]
  return *arrays[:3], KeyIntervals(*intervals), arrays[3], jnp.asarray(cotangents[1], "float32")


def with_grads(function):
  def run(query, key, value, intervals, *cotangents):
    results, pull_back = jax.vjp(lambda *arrays: function(*arrays, intervals), query, key, value)
    return *results, *pull_back(cotangents)

  return jax.jit(run)


@functools.cache
def program(layout, ulysses, tensor, soft_cap):
  """The mesh, and the compiled function of out, log-sum-exp and gradients."""
  shape = layout.ring_size, ulysses, tensor
  mesh = jax.make_mesh(
    shape, (*SEQUENCE, "tensor"), (AxisType.Explicit,) * 3, devices=jax.devices()[: np.prod(shape)]
  )
  rows, heads = PartitionSpec(None, SEQUENCE), PartitionSpec(None, SEQUENCE, "tensor")
  sharded = jax.shard_map(
    lambda *args: ulysses_attention(
      *args, layout=layout, ring_axis="ring", ulysses_axis="ulysses", soft_cap=soft_cap
    ),
    mesh=mesh,
    in_specs=(heads, heads, heads, KeyIntervals(rows, rows)),
    out_specs=(heads, heads),
  )
  return mesh, with_grads(sharded)


def run(case_inputs, kind, ring_size, ulysses, tensor=1, soft_cap=None):
  """The results in the order of the sequence."""
  layout = Layout(kind, ring_size)
  mesh, compiled = program(layout, ulysses, tensor, soft_cap)
  permutation = layout.permutation(case_inputs[0].shape[1])

  def place(array):
    axes = (None, SEQUENCE, "tensor")[: min(array.ndim, 3)]
    return jax.device_put(array[:, permutation], NamedSharding(mesh, PartitionSpec(*axes)))

  with jax.set_mesh(mesh):
    results = compiled(*jax.tree.map(place, case_inputs))
  return [np.asarray(array)[:, np.argsort(permutation)] for array in results]


@functools.cache
def reference_program(soft_cap):
  return with_grads(functools.partial(attention, backend="reference", soft_cap=soft_cap))


def reference(case, dtype="float32"):
  """The results of the unsharded reference, in float32 also for rounded inputs."""
  exact = jax.tree.map(
    lambda array: array.astype("float32") if array.dtype == dtype else array, inputs(case, dtype)
  )
  return [np.asarray(array) for array in reference_program(case.soft_cap)(*exact)]


def error(actual, expected):
  is_finite = np.isfinite(expected)
  np.testing.assert_array_equal(actual[~is_finite], expected[~is_finite])
  difference = actual.astype("float32")[is_finite] - expected[is_finite]
  return np.abs(difference).max() / np.abs(expected[is_finite]).max()


@pytest.mark.parametrize(
  "ring_size, ulysses, G",
  (
    *((1, 2, 1), (1, 2, 4), (1, 4, 2), (1, 4, 4), (1, 8, 1), (1, 8, 4)),
    *((2, 2, 1), (2, 2, 4), (2, 4, 2), (2, 4, 4), (4, 2, 1), (4, 2, 2)),
  ),
)
def test_every_mesh_equals_the_whole(ring_size, ulysses, G):
  """On each mesh, key heads that are copied, and more of them: one per device, or several."""
  case = case_of(G=G)
  actual = run(inputs(case), "zigzag", ring_size, ulysses)
  for array, expected in zip(actual, reference(case)):
    assert error(array, expected) < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("contiguous", "zigzag"))
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_equals_the_whole(mask, kind):
  case = case_of(mask)
  for array, expected in zip(run(inputs(case), kind, 2, 4), reference(case)):
    assert error(array, expected) < 3e-6


@pytest.mark.parametrize("ring_size, ulysses", ((1, 1), (2, 1), (1, 2)))
def test_soft_cap_reaches_the_backend_on_every_path(ring_size, ulysses):
  case = case_of(soft_cap=1.5)
  actual = run(inputs(case), "zigzag", ring_size, ulysses, soft_cap=1.5)
  for array, expected in zip(actual, reference(case)):
    assert error(array, expected) < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize(
  "H, G, ring_size, ulysses, tensor, soft_cap",
  ((12, 6, 2, 4, 1, None), (12, 4, 1, 6, 1, None), (8, 2, 2, 2, 2, 1.5)),
)
def test_heads_that_neither_divides(H, G, ring_size, ulysses, tensor, soft_cap):
  """Four devices for six key/value heads, six for four, and heads also sharded over `tensor`."""
  case = case_of(H=H, G=G, soft_cap=soft_cap)
  if ulysses == 6:
    case = Case("causal", attention_cases.causal, B=2, Q=60, K=60, H=H, G=G)
  actual = run(inputs(case), "zigzag", ring_size, ulysses, tensor, soft_cap)
  for array, expected in zip(actual, reference(case)):
    assert error(array, expected) < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("G", (1, 8))
def test_bfloat16_error_does_not_grow_with_the_mesh(G):
  case = case_of("causal", G=G)
  expected = reference(case, "bfloat16")
  errors = {}
  for sizes in ((1, 1), (2, 4)):
    actual = run(inputs(case, "bfloat16"), "zigzag", *sizes)
    errors[sizes] = [
      np.sqrt(np.mean((array.astype("float32") - wanted) ** 2))
      for array, wanted in zip(actual, expected)
    ]
  # Copies of a key/value head round their gradients one by one; a sum of roundings is no larger
  # than some three halves of one rounding of the sum.
  copied = 1.1 if G == 8 else 1.5
  bounds = dict(out=1.1, lse=1.1, query=1.1, key=copied, value=copied)
  for (name, bound), alone, sharded in zip(bounds.items(), errors[1, 1], errors[2, 4]):
    assert sharded <= bound * alone or sharded < 1e-6, name


@pytest.mark.parametrize("ring_size, ulysses", ((1, 4), (2, 4)))
def test_another_document_changes_no_bit(ring_size, ulysses):
  """Changing one token of a document leaves out and gradients of all others unchanged."""
  case = case_of()
  before_inputs = inputs(case)
  segment_ids = attention_cases.segment_ids(case.B, case.Q)
  token = 20
  perturbed = [
    array.at[0, token].set(100.0) if index in (0, 1, 2, 4) else array
    for index, array in enumerate(before_inputs)
  ]
  others = segment_ids != segment_ids[0, token]
  others[1:] = True
  before, after = (
    run(arrays, "zigzag", ring_size, ulysses) for arrays in (before_inputs, perturbed)
  )
  for array_before, array_after in zip(before, after):
    np.testing.assert_array_equal(array_before[others], array_after[others])
    assert (array_before[~others] != array_after[~others]).any()


def test_heads_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="6 query heads per device do not divide over the 4 devices"):
    run(inputs(case_of(H=6)), "contiguous", 1, 4)
