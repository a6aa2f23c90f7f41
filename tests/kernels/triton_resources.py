"""Compiles the Triton kernels to machine code, without a GPU, and prints the resources they use.

  python -m tests.kernels.triton_resources [--kernel=NAME] CAPABILITY DTYPE HEAD_DIM

prints one JSON line per kernel: shared memory and spilled bytes per thread (the stack), registers,
and the kind of matrix instruction, with the block sizes of `kernels.attention.triton.block_sizes`
and `kernels.experts.triton.backend`. The kernels of experts do not depend on HEAD_DIM.
"""

import argparse
import json
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention.triton import backward, forward
from kernels.attention.triton.block_sizes import Blocks, blocks_for
from kernels.decode.triton import kernel as decode_kernel
from kernels.experts.triton import backend as experts_backend, kernel as experts_kernel

KERNELS = {
  "forward": forward.forward,
  "query_grad": backward.query_grad,
  "key_value_grad": backward.key_value_grad,
  "decode": decode_kernel.partial,
  "decode_int8": decode_kernel.partial,
}
EXPERT_KERNELS = {
  "product": experts_kernel.product,
  "product_transposed": experts_kernel.product,
  "outer": experts_kernel.outer,
}
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
INSTRUCTIONS = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}


def resources(name: str, capability: int, dtype: str, head_dim: int, blocks: Blocks) -> dict:
  """Compiles one kernel for one kind of GPU, without soft cap, for groups of four heads."""
  kernel = KERNELS[name]
  constants = dict(GROUP=4, HEAD_DIM=head_dim, QUERY_BLOCK=blocks.query, KEY_BLOCK=blocks.key)
  constants |= dict(SCALE=head_dim**-0.5, SOFT_CAP=None)
  constants |= dict(ROW_BLOCK=blocks.query, IS_QUANTIZED=name == "decode_int8")
  constants["PRECISION"] = "tf32x3" if dtype == "float32" else None

  def kind(argument):
    if argument.startswith("num_"):
      return "i32"
    if argument.startswith(("start", "stop", "tables", "layer")):
      return "*i32"
    if any(part in argument for part in ("log_sum_exp", "delta", "grad", "scale", "out_P")):
      return "*fp32"
    is_int8 = name == "decode_int8" and argument.endswith("LxBxKxGxD")
    return "*i8" if is_int8 else TYPES[dtype]

  used = _compiled(kernel, kind, constants, capability, blocks)
  return dict(kernel=name, dtype=dtype, head_dim=head_dim, **used)


def expert_resources(name: str, capability: int, dtype: str) -> dict:
  """Compiles one kernel of the grouped product for one kind of GPU."""
  kernel = EXPERT_KERNELS[name]
  blocks = experts_backend.blocks_for(capability, dtype)[name == "outer"]
  constants = dict(INPUTS=4096, OUTPUTS=14336, IS_TRANSPOSED=name == "product_transposed")
  constants |= dict(ROW_BLOCK=blocks.rows, INPUT_BLOCK=blocks.inputs, OUTPUT_BLOCK=blocks.outputs)
  constants["PRECISION"] = "tf32x3" if dtype == "float32" else None

  def kind(argument):
    if argument.endswith(("_E", "_V", "_1")) and argument != "weight_E":
      return "*i32"
    return "*fp32" if argument == "out_ExIxO" else TYPES[dtype]

  used = _compiled(kernel, kind, constants, capability, blocks)
  return dict(kernel=name, dtype=dtype, **used)


def _compiled(kernel, kind, constants, capability, blocks) -> dict:
  """What a compiled kernel uses.

  Args:
    kernel: the kernel.
    kind: Triton's type of an argument by its name. Pointers are multiples of 16 bytes.
    constants: may have some that the kernel does not take.
    capability: ten times the compute capability.
    blocks: with the numbers of warps and stages.
  """
  signature, attributes = {}, {}
  for i, parameter in enumerate(kernel.params):
    own = "constexpr" if parameter.is_constexpr else kind(parameter.name)
    signature[parameter.name] = own
    if own.startswith("*"):
      attributes[(i,)] = [["tt.divisibility", 16]]
  constants = {
    (i,): constants[parameter.name]
    for i, parameter in enumerate(kernel.params)
    if parameter.is_constexpr
  }
  compiled = triton.compile(
    ASTSource(kernel, signature, constants, attributes),
    target=GPUTarget("cuda", capability, 32),
    options=dict(num_warps=blocks.num_warps, num_stages=blocks.num_stages, enable_fp_fusion=True),
  )
  with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    usage = subprocess.run(
      [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
      capture_output=True,
      text=True,
      check=True,
    ).stdout
  registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
  instructions = [kind for text, kind in INSTRUCTIONS.items() if text in compiled.asm["ptx"]]
  return dict(
    capability=capability,
    blocks=blocks,
    shared=compiled.metadata.shared,
    registers=int(registers),
    stack=int(stack),
    instructions=instructions,
    asynchronous_copies=compiled.asm["ptx"].count("cp.async."),
  )


def main() -> None:
  parser = argparse.ArgumentParser()
  names = [*KERNELS, *EXPERT_KERNELS]
  parser.add_argument("--kernel", choices=names, action="append", help="all unless given")
  parser.add_argument("capability", type=int)
  parser.add_argument("dtype", choices=TYPES)
  parser.add_argument("head_dim", type=int)
  flags = parser.parse_args()
  for name in flags.kernel or names:
    if name in EXPERT_KERNELS:
      used = expert_resources(name, flags.capability, flags.dtype)
    else:
      blocks = blocks_for(name, flags.capability, flags.head_dim, flags.dtype)
      used = resources(name, flags.capability, flags.dtype, flags.head_dim, blocks)
    print(json.dumps(used), flush=True)


if __name__ == "__main__":
  main()
