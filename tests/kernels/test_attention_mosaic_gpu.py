"""The Hopper backend in JAX's interpreter of Mosaic GPU: values, gradients, races and deadlocks.

The interpreter runs warpgroups as threads, with barriers, TMA copies and vector clocks. It does not
cover memory layouts, registers and the matrix instruction. It cannot run that instruction with its
left operand and accumulator in registers, so the tests replace `accumulate`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import backend as backend_lib
from kernels.attention.intervals import KeyIntervals
from kernels.attention.mosaic_gpu import MOSAIC_GPU, backend as mosaic_gpu, parts
from tests.kernels import attention_cases
from tests.kernels.attention_cases import Case

TOLERANCES = {"bfloat16": 1.5e-2, "float16": 2e-3}
NAMES = ("out", "log_sum_exp", "query gradient", "key gradient", "value gradient")
SMALL = dict(B=1, H=1, G=1, D=64)


def grouped_documents(B, Q, K):
  """Documents of 100 and 60 tokens, then padding: full, masked and skipped blocks."""
  index = np.arange(Q)[None]
  start, stop = np.where(index < 100, 0, 100), index + 1
  return tuple((array * (index < 160)).astype(np.int32) for array in (start, stop))


def mostly_empty(B, Q, K):
  """The second tile of queries sees no key; the first sees a window."""
  index = np.arange(Q, dtype=np.int32)[None]
  stop = np.where((index < 100) & (index % 7 > 0), index + 1, 0)
  return np.maximum(stop - 40, 0), stop


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  def accumulate(*terms):
    rights = [right[...] for _, _, right in terms]
    plgpu.commit_smem()  # Matrix instructions read as TMA writes, but threads do not.
    return [
      total + jnp.matmul(left, right, preferred_element_type=jnp.float32)
      for (total, left, _), right in zip(terms, rights)
    ]

  monkeypatch.setattr(parts, "accumulate", accumulate)
  blocks = {name: {64: (64, 2), 128: (64, 2), 256: (32, 2)} for name in mosaic_gpu.BLOCKS}
  monkeypatch.setattr(mosaic_gpu, "BLOCKS", blocks)
  yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()


@pytest.fixture(autouse=True)
def no_races(capfd):
  """Fails if the interpreter has printed a race."""
  yield
  printed = capfd.readouterr().out
  assert "RACE" not in printed, printed


def check(case, dtype):
  query, key, value, intervals, *cotangents = case.arrays()
  arrays = [jnp.asarray(array, dtype) for array in (query, key, value)]
  pairs = KeyIntervals(*map(jnp.asarray, intervals))
  cotangents = jnp.asarray(cotangents[0], dtype), jnp.asarray(cotangents[1], "float32")
  options = dict(scale=case.D**-0.5, soft_cap=case.soft_cap)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    results = mosaic_gpu.forward(*arrays, pairs, **options, out_dtype=arrays[0].dtype)
    delta = backend_lib.delta(*results, *cotangents)
    grads = MOSAIC_GPU.gradients(*arrays, pairs, results[1], delta, cotangents[0], **options)
    actual = [np.asarray(array, "float64") for array in (*results, *grads)]
  exact = [np.asarray(array, "float64") for array in (*arrays, *cotangents)]
  expected = attention_cases.judge(*exact[:3], intervals, *exact[3:], soft_cap=case.soft_cap)
  for name, array, wanted in zip(NAMES, actual, expected):
    is_finite = np.isfinite(wanted)
    np.testing.assert_array_equal(array[~is_finite], wanted[~is_finite], name)
    error = np.abs(array[is_finite] - wanted[is_finite]).max()
    assert error <= TOLERANCES[dtype] * np.abs(wanted[is_finite]).max(), name


@pytest.mark.slow
def test_documents_with_grouped_heads():
  check(Case("documents", grouped_documents, Q=170, K=170, **(SMALL | dict(H=2))), "bfloat16")


@pytest.mark.slow
def test_head_dim_256():
  """Blocks of 32 have memory tiles of half the width, and dK and dV take two passes."""
  check(Case("wide", grouped_documents, Q=130, K=130, **(SMALL | dict(H=2, D=256))), "bfloat16")


@pytest.mark.slow
def test_empty_rows_and_tiles_with_a_soft_cap():
  check(Case("empty", mostly_empty, Q=130, K=100, soft_cap=1.5, **SMALL), "float16")


@pytest.mark.slow
@pytest.mark.parametrize(
  "mask, dtype", (("causal", "float16"), ("packed", "bfloat16"), ("bidirectional", "bfloat16"))
)
def test_masks(mask, dtype):
  # Batches and key heads are indexed alike under every mask.
  heads = dict(B=2, H=4, G=2) if mask == "packed" else dict(B=1, H=2, G=1)
  shape = dict(Q=200, K=300 if mask == "bidirectional" else 200, D=128) | heads
  check(Case(mask, getattr(attention_cases, mask), **shape), dtype)


def test_results_vary_over_the_axes_of_a_surrounding_shard_map():
  """Only traces the program."""
  mesh = jax.make_mesh((2,), ("ring",), devices=jax.devices()[:2])
  spec = jax.P(None, "ring")

  def local(query, start, stop, statistics):
    intervals = KeyIntervals(start, stop)
    options = dict(scale=1.0, soft_cap=None)
    results = mosaic_gpu.forward(query, query, query, intervals, out_dtype="float32", **options)
    rest = statistics, statistics, query
    grads = mosaic_gpu.backward(query, query, query, intervals, *rest, **options)
    for result in (*results, *grads):
      assert jax.typeof(result).manual_axis_type.varying == {"ring"}
    return results[0]

  shapes = (((1, 256, 2, 64), "bfloat16"), ((1, 256), "int32"), ((1, 256), "int32"))
  shapes += (((1, 256, 2), "float32"),)
  sharding = jax.NamedSharding(mesh, spec)
  arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
  with jax.set_mesh(mesh):
    jax.eval_shape(jax.shard_map(local, in_specs=spec, out_specs=spec), *arguments)


def test_what_is_not_supported_is_said():
  query = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
  assert "Hopper" in mosaic_gpu.unsupported(query, query)
