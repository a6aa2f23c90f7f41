"""GPU attention compiles ahead of time, without a GPU, and fits the chip.

Compilers run in their own processes, because this one may hold Triton's interpreter.
"""

import importlib.util
import json
import os

import pytest

from tests.programs import Program

SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448}
INSTRUCTIONS = {80: ["mma"], 89: ["mma"], 90: ["wgmma"], 100: ["tcgen05"]}
# Bytes per thread. A few hundred bytes, spilled once per block, cost little compared with the
# products of the block, of which a decode kernel has few.
LARGEST_STACK, LARGEST_DECODE_STACK = 640, 0


def run(program, *arguments):
  started = Program(program, *arguments, environment=os.environ | {"XLA_FLAGS": ""})
  output, errors = started.communicate()
  assert started.returncode == 0, errors[-2000:]
  return output


def check(*arguments):
  pytest.importorskip("triton")
  lines = run("tests.kernels.triton_resources", *arguments).splitlines()
  for used in map(json.loads, lines):
    capability = used["capability"]
    assert used["shared"] <= SHARED_MEMORY[capability], used
    is_decode = used["kernel"].startswith("decode")
    assert used["stack"] <= (LARGEST_DECODE_STACK if is_decode else LARGEST_STACK), used
    # A decode kernel may have fewer rows than the larger instructions need, and waits for memory.
    if used["dtype"] != "float32" and not is_decode:
      assert used["instructions"] == INSTRUCTIONS[capability], used
    assert used["blocks"][-1] == 1 or used["asynchronous_copies"], used
  return len(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
  "capability, head_dim, dtype", ((89, 64, "float16"), (90, 128, "bfloat16"))
)
def test_triton_kernels_fit(capability, head_dim, dtype):
  """Least memory, and the most used; for others, run python -m tests.kernels.triton_resources."""
  assert check(capability, dtype, head_dim) == 8


def needs_plugin():
  if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
    pytest.skip("needs JAX's CUDA plugin: pip install 'jax[cuda13]'")


def compiled(*arguments):
  needs_plugin()
  return json.loads(run("tests.kernels.compile_for_gpu", *arguments))


@pytest.mark.slow
@pytest.mark.parametrize(
  "gpu, backend, head_dim, dtype, length",
  (
    ("a100", "triton", 256, "float32", 16384),
    ("b200", "triton", 128, "bfloat16", 1 << 20),
    ("h200", "mosaic_gpu", 64, "bfloat16", 1 << 20),
    ("h200", "mosaic_gpu", 128, "float16", 16384),
    ("h200", "mosaic_gpu", 256, "bfloat16", 16384),
  ),
)
def test_forward_and_backward_compile(gpu, backend, head_dim, dtype, length):
  """Compiles whole steps with XLA. Temporaries are gradients in float32, not scores."""
  made = compiled(gpu, backend, head_dim, dtype, length)
  assert made["temporary_bytes"] < made["argument_bytes"] + made["output_bytes"], made
  assert all(spilled <= 64 for spilled in made["spilled_bytes"]), made


@pytest.mark.slow
@pytest.mark.parametrize(
  "gpu, program, head_dim, dtype",
  (
    ("a100", "decode", 64, "float16"),
    ("h200", "decode", 128, "bfloat16"),
    ("b200", "decode_int8", 256, "bfloat16"),
  ),
)
def test_decode_compiles_and_copies_no_cache(gpu, program, head_dim, dtype):
  made = compiled(gpu, program, head_dim, dtype, 1 << 20)
  assert made["temporary_bytes"] < made["argument_bytes"] / 64, made


@pytest.mark.slow
def test_grouped_product_and_gradients_compile():
  """The only temporaries are tables of visits and, in float32, the gradients of the weights."""
  made = compiled("h200", "experts", 128, "bfloat16", 16384)
  rows, K, N, experts = 16384, 1024, 4096, 8
  assert made["temporary_bytes"] < 4 * experts * K * N + 2 * rows * (K + N) + (1 << 20), made


@pytest.mark.slow
def test_defaults_on_an_h200():
  needs_plugin()
  program = """
import jax, jax.numpy as jnp
from kernels import backends
from kernels.attention import api
from kernels.decode import api as decode
from tests.kernels.compile_for_gpu import mesh
def names(dtype, head_dim):
  query = jax.ShapeDtypeStruct((1, 256, 4, head_dim), dtype)
  return api.choose(None, query, query).name
with jax.set_mesh(mesh("h200")):
  query, cache = (jax.ShapeDtypeStruct((*layers, 1, 256, 4, 128), jnp.bfloat16)
                  for layers in ((), (2,)))
  print(names(jnp.bfloat16, 128), names(jnp.float32, 256), names(jnp.bfloat16, 32),
        backends.choose("decode", decode.BACKENDS, None, query, cache).name)
"""
  assert run(program).split() == ["mosaic_gpu", "triton", "xla", "triton"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("triton", "mosaic_gpu"))
def test_attention_that_is_kept_for_the_backward_pass_runs_once(backend):
  """One kernel forward, and two backward, in a scan over layers."""
  needs_plugin()
  program = f"""
import jax, jax.numpy as jnp
from lwm.parallel import xla_flags
xla_flags.apply()
from kernels.attention import SAVED_NAMES, KeyIntervals, attention
from tests.kernels.compile_for_gpu import mesh
gpu_mesh = mesh("h100")
sharding = jax.NamedSharding(gpu_mesh, jax.P())
S, H, D = 256, 2, 128
keep = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
def loss(x, weights, intervals):
  def layer(x, weight):
    query = (x @ weight).reshape(1, S, H, D)
    out, _ = attention(query, query, query, intervals, backend="{backend}")
    return x + out.reshape(1, S, H * D), None
  layer = jax.checkpoint(layer, policy=keep, prevent_cse=False)
  return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32))
def of(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
rows = of(1, S, dtype=jnp.int32)
arguments = of(1, S, H * D), of(3, H * D, H * D), KeyIntervals(rows, rows)
with jax.set_mesh(gpu_mesh):
  text = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile().as_text()
print(*(text.count(f'custom_call_target="{{name}}"')
        for name in ("triton_kernel_call_ffi", "mosaic_gpu_v2")))
"""
  expected = {"triton": ["3", "0"], "mosaic_gpu": ["0", "3"]}[backend]
  assert run(program).split() == expected
