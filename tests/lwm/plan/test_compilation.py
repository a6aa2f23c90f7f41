import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwm.errors import UserError
from lwm.plan import compilation as compilation_lib, topology
from lwm.plan.compilation import compile_ahead, first_sentence, read_assignment


def twenty_copies(x):
  """Keeps twenty copies of x, and returns an array for which x can be donated."""
  _, kept = jax.lax.scan(lambda carry, _: (jnp.sin(carry), carry), x, length=20)
  return (kept * kept[::-1]).sum((0, 1)), x + 1


def lowered(name, size):
  machine = topology.load(name)
  sharding = NamedSharding(Mesh(machine.devices[:1], ("x",)), PartitionSpec())
  x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=sharding)
  return jax.jit(twenty_copies, donate_argnums=0).lower(x)


@pytest.mark.parametrize("name", ("v4:2x2x1", "v5e:2x2"))
def test_out_of_memory_is_an_answer(name):
  size = 40960
  compilation = compile_ahead(lowered(name, size), "tpu")
  array = 2 * size**2
  # x, donated; twenty copies, and one that the loop carries.
  assert compilation.arguments == array
  assert compilation.temporaries == pytest.approx(21 * array, rel=1e-3)
  assert compilation.total == pytest.approx(22 * array, rel=1e-3)
  largest = compilation.buffers[0]
  assert (largest.bytes, largest.shape) == (20 * array, f"bf16[20,{size},{size}]")
  assert "while/body" in largest.operation
  assert [buffer.operation for buffer in compilation.buffers].count("x") == 1


@pytest.mark.slow
def test_convolutions_get_the_scratchpad_that_they_need(monkeypatch):
  monkeypatch.setattr(
    compilation_lib, "_QUICK_CONVOLUTIONS", {"xla_tpu_scoped_vmem_limit_kib": "16"}
  )
  sharding = NamedSharding(Mesh(topology.load("v5p:2x2x1").devices[:1], ("x",)), PartitionSpec())
  x_BxHxWxC = jax.ShapeDtypeStruct((1, 64, 64, 128), jnp.bfloat16, sharding=sharding)
  kernel = jax.ShapeDtypeStruct((3, 3, 128, 128), jnp.bfloat16, sharding=sharding)

  def convolve(x_BxHxWxC, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x_BxHxWxC, kernel, (1, 1), "SAME", dimension_numbers=layout)

  program = jax.jit(convolve).lower(x_BxHxWxC, kernel)
  with pytest.raises(UserError, match="ScopedVmem"):
    compilation_lib._compile(program, "tpu", compilation_lib._QUICK_CONVOLUTIONS)
  assert compile_ahead(program, "tpu").arguments == 2 * (64 * 64 * 128 + 9 * 128 * 128)


def test_agrees_with_the_compiled_program():
  program = lowered("cpu:1", 1024)
  compilation = compile_ahead(program, "cpu")
  memory = program.compile().memory_analysis()
  assert compilation.arguments == memory.argument_size_in_bytes
  assert compilation.temporaries == pytest.approx(memory.temp_size_in_bytes, rel=1e-3)


@pytest.mark.parametrize(
  "error, sentence",
  [
    (
      # libtpu and the CUDA plugin, jax 0.11.2.
      "INTERNAL: during context [x]: Expected instruction to have shape equal to (s32[], "
      "bf16[4,32768,4096]{2,1,0}, /*index=2*/f32[32]{0:T(256)S(5)}), actual shape is (s32[], "
      "bf16[4,8]{1,0}):\n%tuple.187 = (s32[], bf16[4,8]{1,0}) tuple(%add.1, %add.2)",
      "INTERNAL: during context [x]: Expected instruction to have shape equal to (...), actual "
      "shape is (...).",
    ),
    ("INTERNAL: ptxas 12.4 is too old. Install a newer one.", "INTERNAL: ptxas 12.4 is too old."),
    ("UNIMPLEMENTED: " + 100 * "long ", "UNIMPLEMENTED: " + 46 * "long " + "..."),
  ],
  ids=("shapes", "sentences", "long"),
)
def test_first_sentence_of_an_error(error, sentence):
  assert first_sentence(error) == sentence


# The format as libtpu 0.0.48 and XLA write it.
ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <2 add.0 @0> (size=512,offset=0): bf16[]{:T(256)}
allocation 1: size 4096, page 0, parameter 0, shape |f32[1024]| at ShapeIndex {}, maybe-live-out:
 value: <37 w.1 @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 2: size 1000, color 1, page 0, preallocated-temp:
 value: <6 scratch.1 @1> (size=1000,offset=0): f32[250]{0:T(256)S(1)}
allocation 3: size 800, color 5, page 0, preallocated-temp:
 value: <8 offload.1 @5> (size=800,offset=0): f32[200]{0:T(256)S(5)}
allocation 4: size 9000, page 0, preallocated-temp:
 value: <12 while{1} (phi) @0> (size=6000,offset=0): f32[1500]{0:T(256)}
 value: <13 fusion.1{1} @0> (size=6000,offset=0): f32[1500]{0:T(256)}
 value: <14 late.1 @0> (size=5000,offset=1000): f32[1250]{0:T(256)}
 value: <15 beside.1 @0> (size=3000,offset=6000): f32[750]{0:T(256)}
 value: <16 tuple.1 @0> (size=512,offset=0): (f32[1500]{0:T(256)}, f32[750]{0:T(256)})
"""
TEXT = """  %fusion.1 = f32[1500]{0} fusion(%w.1), metadata={op_name="jit(f)/made"}
  ROOT %late.1 = f32[1250]{0} copy(%fusion.1), metadata={op_name="jit(f)/late"}
  %w.1 = f32[1024]{0} parameter(0), metadata={op_name="state[\\'w\\']"}
"""


def test_reads_what_xla_dumps():
  compilation = read_assignment(ASSIGNMENT, TEXT, "tpu", 0.0)
  assert (compilation.arguments, compilation.temporaries) == (4096, 9000)
  assert (
    compilation.total == 4096 + 9000
  )  # Without thread-local buffers, the scratchpad and the host.
  assert compilation.host == 800
  # A buffer that reuses another's memory is not listed.
  assert [(b.bytes, b.operation) for b in compilation.buffers] == [
    (6000, "jit(f)/made"),
    (4096, "state['w']"),
    (3000, ""),
  ]
  # On a GPU, color 1 is the device's memory too.
  assert read_assignment(ASSIGNMENT, TEXT, "gpu", 0.0).total == 4096 + 9000 + 1000
