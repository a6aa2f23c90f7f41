"""RingAttention on eight CPU devices against attention over the whole sequence."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var, jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels.attention import SAVED_NAMES, KeyIntervals, attention, xla
from kernels.ring import Layout, ring_attention
from tests.kernels import attention_cases
from tests.kernels.attention_cases import Case

KINDS = ("contiguous", "zigzag")
CASES = tuple(
  Case(name, mask, B=2, Q=64, K=64, H=4, G=2, soft_cap=soft_cap)
  for name, mask, soft_cap in (
    ("causal", attention_cases.causal, None),
    ("packed", attention_cases.packed, None),
    ("sliding_window", attention_cases.sliding_window, None),
    ("frames", attention_cases.frames, None),
    ("bidirectional", attention_cases.bidirectional, None),
    ("empty_rows", attention_cases.empty_rows, None),
    ("soft_cap", attention_cases.packed, 1.5),
  )
)
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(xla, "QUERY_BLOCK", 8)
  monkeypatch.setattr(xla, "KEY_BLOCK", 8)


@pytest.fixture(autouse=True)
def no_silent_broadcast():
  with jax.numpy_rank_promotion("raise"):
    yield


def inputs(case, dtype="float32"):
  query, key, value, intervals, *cotangents = case.arrays()
  arrays = [jnp.asarray(array, dtype) for array in (query, key, value, cotangents[0])]
  return *arrays[:3], KeyIntervals(*intervals), arrays[3], jnp.asarray(cotangents[1], "float32")


class Ring:
  """Attention over a (data, ring, tensor) mesh; `ring_of` shares its compiled programs."""

  def __init__(self, kind, ring_size, data=1, tensor=1):
    self.layout = Layout(kind, ring_size)
    devices = jax.devices()[: data * ring_size * tensor]
    shape, names = (data, ring_size, tensor), ("data", "ring", "tensor")
    self.mesh = jax.make_mesh(shape, names, (AxisType.Explicit,) * 3, devices=devices)
    self.with_grads = functools.cache(functools.partial(with_grads, self.attention))

  def place(self, array, permutation):
    axes = ("data", "ring", "tensor")[: min(array.ndim, 3)]
    sharding = NamedSharding(self.mesh, PartitionSpec(*axes))
    return jax.device_put(array[:, permutation], sharding)

  def attention(self, query, key, value, intervals, **options):
    rows, heads = PartitionSpec("data", "ring"), PartitionSpec("data", "ring", "tensor")
    return jax.shard_map(
      lambda *args: ring_attention(*args, layout=self.layout, axis_name="ring", **options),
      in_specs=(heads, heads, heads, KeyIntervals(rows, rows)),
      out_specs=(heads, heads),
    )(query, key, value, intervals)

  def run(self, case_inputs, **options):
    """out, log-sum-exp and gradients of query, key, value, in the order of the sequence."""
    permutation = self.layout.permutation(case_inputs[0].shape[1])
    with jax.set_mesh(self.mesh):
      placed = jax.tree.map(lambda array: self.place(array, permutation), case_inputs)
      results = self.with_grads(**options)(*placed)
    return [np.asarray(array)[:, np.argsort(permutation)] for array in results]


ring_of = functools.cache(Ring)


def with_grads(function, **options):
  def run(query, key, value, intervals, *cotangents):
    results, pull_back = jax.vjp(
      lambda *arrays: function(*arrays, intervals, **options), query, key, value
    )
    return *results, *pull_back(cotangents)

  return jax.jit(run)


reference_with_grads = functools.cache(
  functools.partial(with_grads, attention, backend="reference")
)


def reference(case, dtype="float32"):
  """The results of the unsharded reference, in float32 also for rounded inputs."""
  query, key, value, intervals, *cotangents = inputs(case, dtype)
  exact = jax.tree.map(lambda array: array.astype("float32"), (query, key, value, *cotangents))
  exact = *exact[:3], intervals, *exact[3:]
  return [np.asarray(array) for array in reference_with_grads(soft_cap=case.soft_cap)(*exact)]


def error(actual, expected):
  is_finite = np.isfinite(expected)
  np.testing.assert_array_equal(actual[~is_finite], expected[~is_finite])
  difference = actual.astype("float32")[is_finite] - expected[is_finite]
  return np.abs(difference).max() / np.abs(expected[is_finite]).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ring_of_four_equals_the_whole(case, kind):
  actual = ring_of(kind, 4).run(inputs(case), soft_cap=case.soft_cap)
  for array, expected in zip(actual, reference(case)):
    assert error(array, expected) < 3e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  "ring_size, data, tensor", ((1, 1, 1), (2, 1, 1), (8, 1, 1), (2, 2, 2), (4, 1, 2), (1, 2, 2))
)
def test_every_mesh_equals_the_whole(kind, ring_size, data, tensor):
  case = BY_NAME["packed"]
  actual = ring_of(kind, ring_size, data, tensor).run(inputs(case))
  for array, expected in zip(actual, reference(case)):
    assert error(array, expected) < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_error_does_not_grow_with_the_ring(kind):
  case = Case("causal", attention_cases.causal, B=2, Q=128, K=128, D=16)
  expected = reference(case, "bfloat16")
  errors = {}
  for ring_size in (1, 8):
    actual = ring_of(kind, ring_size).run(inputs(case, "bfloat16"))
    errors[ring_size] = [
      np.sqrt(np.mean((array.astype("float32") - wanted) ** 2))
      for array, wanted in zip(actual, expected)
    ]
  # The log-sum-exp is float32 in both: its error is 1e-7, of no direction.
  for name, single, ring in zip(("out", "lse", "query", "key", "value"), errors[1], errors[8]):
    assert ring <= 1.1 * single or ring < 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ring_size", (1, 2, 4, 8))
def test_another_document_changes_no_bit(kind, ring_size):
  """Changing one token of a document leaves out and gradients of all others unchanged."""
  case = BY_NAME["packed"]
  ring = ring_of(kind, ring_size)
  before_inputs = inputs(case)
  segment_ids = attention_cases.segment_ids(case.B, case.Q)
  token = 20
  perturbed = [
    array.at[0, token].set(100.0) if index in (0, 1, 2, 4) else array
    for index, array in enumerate(before_inputs)
  ]
  others = segment_ids != segment_ids[0, token]
  others[1:] = True
  before, after = ring.run(before_inputs), ring.run(perturbed)
  for array_before, array_after in zip(before, after):
    np.testing.assert_array_equal(array_before[others], array_after[others])
    assert (array_before[~others] != array_after[~others]).any()


def counting(counts):
  """The blockwise backend, which records each forward and backward that runs."""

  def forward(*args, **options):
    jax.debug.callback(lambda: counts.update(["forward"]))
    return xla.forward(*args, **options)

  def backward(*args, **options):
    jax.debug.callback(lambda: counts.update(["backward"]))
    return xla.backward(*args, **options)

  return xla.XLA._replace(forward=forward, backward=backward)


def visible_chunks(kind, ring_size, intervals, length):
  """How many (shard of queries, chunk of keys) pairs meet, by the mask itself.

  The second number counts a shard's own keys in halves, as the backward pass does.
  """
  layout = Layout(kind, ring_size)
  permutation = layout.permutation(length)
  start, stop = intervals
  key = np.arange(length)
  seen = (key >= start[..., None]) & (key < stop[..., None])
  seen = seen.any(axis=0)[permutation][:, permutation]
  chunks = ring_size * layout.chunks_per_shard
  pairs = seen.reshape(ring_size, -1, chunks, length // chunks).any(axis=(1, 3))
  halves = seen.reshape(ring_size, -1, 2 * ring_size, length // ring_size // 2).any(axis=(1, 3))
  own = np.eye(ring_size, dtype=bool)
  others = pairs & ~np.repeat(own, layout.chunks_per_shard, axis=1)
  return pairs.sum(), others.sum() + (halves & np.repeat(own, 2, axis=1)).sum()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  "name, contiguous, zigzag",
  (("causal", (10, 14), 26), ("sliding_window", (7, 11), 14), ("packed", (9, 13), 23)),
)
def test_hops_without_work_are_skipped(name, contiguous, zigzag, kind):
  """There are 16 pairs of shards (contiguous), or 32 pairs of shard and chunk (zigzag)."""
  case = BY_NAME[name]
  expected = dict(contiguous=contiguous, zigzag=(zigzag, zigzag))[kind]
  assert visible_chunks(kind, 4, case.mask(case.B, case.Q, case.K), case.Q) == expected
  counts = collections.Counter()
  ring_of(kind, 4).run(inputs(case), backend=counting(counts))
  jax.effects_barrier()
  assert counts == dict(zip(("forward", "backward"), expected))


def alone(jaxpr):
  """The transfers of a program that cannot overlap with attention, given its data dependences.

  In each block of code that contains a transfer, a matrix product, however deeply nested, must
  neither depend on the transfer nor be needed for it.
  """
  found, needs, made_by = [], [], {}
  for index, equation in enumerate(jaxpr.eqns):
    direct = {made_by[v] for v in equation.invars if isinstance(v, Var) and v in made_by}
    needs.append(direct.union(*(needs[i] for i in direct)))
    made_by |= dict.fromkeys(equation.outvars, index)
  products = [i for i, equation in enumerate(jaxpr.eqns) if "dot_general" in str(equation)]
  for index, equation in enumerate(jaxpr.eqns):
    if equation.primitive.name == "ppermute":
      if all(i in needs[index] or index in needs[i] for i in products):
        found.append(equation)
    for inner in jaxprs_in_params(equation.params):
      found += alone(inner)
  return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ring_size", (2, 4))
def test_every_transfer_has_attention_to_run_beside_it(kind, ring_size):
  ring = ring_of(kind, ring_size)
  with jax.set_mesh(ring.mesh):
    permutation = ring.layout.permutation(64)
    placed = jax.tree.map(lambda array: ring.place(array, permutation), inputs(CASES[0]))
    program = jax.make_jaxpr(with_grads(ring.attention))(*placed)
  assert "ppermute" in str(program)
  assert not alone(program.jaxpr)


def lowered(ring_size, dtype="bfloat16"):
  case = Case("causal", attention_cases.causal, B=1, Q=64, K=64)
  ring = ring_of("zigzag", ring_size)
  with jax.set_mesh(ring.mesh):
    placed = jax.tree.map(
      lambda array: ring.place(array, ring.layout.permutation(case.Q)), inputs(case, dtype)
    )
    return with_grads(ring.attention).lower(*placed)


def test_program_does_not_grow_with_the_ring():
  four, eight = (len(lowered(ring_size).as_text().splitlines()) for ring_size in (4, 8))
  assert abs(eight - four) < 0.01 * four


def test_keys_travel_in_their_own_dtype():
  """Forward and backward send keys and values as bfloat16, and only gradients as float32."""
  text = lowered(4).as_text()
  sent = collections.Counter(
    re.findall(r'"?stablehlo\.collective_permute"?.*-> tensor<[0-9x]*x(\w+)>', text)
  )
  # Forward: in its loop. Backward: keys before and in its loop; gradients in it, after it, and at
  # the end.
  assert sent == dict(bf16=2 + 4, f32=6)


def test_a_remat_policy_that_saves_the_names_needs_no_second_forward():
  ring = ring_of("contiguous", 2)

  def count(wrap):
    with jax.set_mesh(ring.mesh):
      placed = jax.tree.map(lambda array: ring.place(array, np.arange(64)), inputs(CASES[0]))
      program = jax.make_jaxpr(with_grads(wrap(ring.attention)))(*placed)
    return attention_cases.exponentials(program.jaxpr)

  policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
  plain = count(lambda function: function)
  assert count(functools.partial(jax.checkpoint, policy=policy)) == plain < count(jax.checkpoint)


def test_a_layout_for_another_ring_is_refused():
  ring = Ring("contiguous", 2)
  ring.layout = Layout("contiguous", 4)
  with pytest.raises(ValueError, match="ring of 4, but mesh axis 'ring' has 2 devices"):
    ring.run(inputs(BY_NAME["causal"]))
