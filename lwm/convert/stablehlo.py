"""Prefill and decode as StableHLO programs, for runtimes without Python or JAX.

The programs run on one device and take the parameters as arguments. They use no kernels of one
platform, so any compiler of StableHLO can compile them.

B batch, P prompt tokens, V vocabulary.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from kernels.decode import whole_length
from lwm import model as model_lib
from lwm.checkpoint.arrays import ArrayInfo
from lwm.checkpoint.parameters import unfinished
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.convert.safetensors import SHARD_BYTES, SafetensorsSink
from lwm.convert.table import Part, Tensor, convert_out, parameter_shapes, write_manifest
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules

SIGNATURE = "signature.json"
_README = """\
# {name}: StableHLO programs

- `prefill.mlir` reads a prompt and returns the logits after its last token and the cache.
- `decode.mlir` reads one token per row and returns the same.

Both are portable StableHLO artifacts for one device, which every PJRT plugin of XLA compiles.
`{signature}` lists their inputs and outputs in order: name, shape and dtype. The inputs that begin
with `params.` are the tensors of that name in `params/`, safetensors files. The other inputs:

- `tokens`: ids. A shorter prompt is padded on the left.
- `start`: for each row, the number of padding tokens on the left.
- `cache.*`: what the call before returned. It holds {context} tokens, padding included.
"""


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the programs are compiled for.

  Attributes:
    batch_size: number of rows.
    prompt_length: tokens of a prompt, padding included.
    context: tokens of a prompt and its continuation; rounded up to what the cache can hold.
  """

  batch_size: int = 1
  prompt_length: int = 128
  context: int = 2048


def export_programs(
  stored: StoredCheckpoint, output: pathlib.Path, sizes: Sizes, dtype: str, platforms: Sequence[str]
) -> None:
  """Writes the programs, their signatures and the parameters into a new directory.

  Args:
    stored: the checkpoint.
    output: must not exist.
    sizes: of the arguments.
    dtype: of the parameters.
    platforms: that the programs can be compiled for: "cpu", "cuda", "tpu".

  Raises:
    UserError: the output exists or cannot be written; nothing is left then.
  """
  signature = {}
  with unfinished(output) as new:
    for name, program in programs(stored, sizes, dtype, platforms).items():
      (new / f"{name}.mlir").write_bytes(program.exported.mlir_module_serialized)
      signature[name] = {"inputs": program.inputs, "outputs": program.outputs}
    (new / SIGNATURE).write_text(json.dumps(signature, indent=1) + "\n")
    context = whole_length(sizes.context)
    readme = _README.format(name=stored.experiment.name, signature=SIGNATURE, context=context)
    (new / "README.md").write_text(readme)
    (new / "params").mkdir()
    _write_params(stored, new, np.dtype(dtype))


def _write_params(stored: StoredCheckpoint, output: pathlib.Path, dtype: np.dtype) -> None:
  """Writes the parameters as the programs take them, and their manifest."""
  config = stored.experiment.model
  shapes = parameter_shapes(config)
  rows = [Tensor(path, (Part(path),)) for path in shapes]
  tensors = {path: ArrayInfo(shape, dtype) for path, shape in shapes.items()}
  with SafetensorsSink(output / "params", tensors, SHARD_BYTES) as sink:
    manifest = convert_out(stored.reader().read, rows, config, sink, lambda name: dtype)
  write_manifest(output, manifest)


class Program(NamedTuple):
  """An exported function, and its inputs and outputs in order: name, shape and dtype of each."""

  exported: export.Exported
  inputs: list[dict[str, Any]]
  outputs: list[dict[str, Any]]


def programs(
  stored: StoredCheckpoint, sizes: Sizes, dtype: str, platforms: Sequence[str]
) -> dict[str, Program]:
  """The programs, by name.

    prefill(params, tokens [B, P], start [B]) -> (logits [B, V], cache)
    decode(params, tokens [B, 1], cache) -> (logits [B, V], cache)

  Args:
    stored: the checkpoint.
    sizes: of the arguments.
    dtype: of the parameters.
    platforms: that the programs can be compiled for: "cpu", "cuda", "tpu".
  """
  experiment = stored.experiment
  theta = stored.stage.rope_theta
  config = dataclasses.replace(experiment.model, vocab_multiple=1)
  model = model_lib.build(config, ShardingRules(sequence=None))
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices("cpu")[:1])):
    params = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), model.abstract()
    )
    rows = jax.ShapeDtypeStruct((sizes.batch_size,), jnp.int32)
    prompt = jax.ShapeDtypeStruct((sizes.batch_size, sizes.prompt_length), jnp.int32)
    token = jax.ShapeDtypeStruct((sizes.batch_size, 1), jnp.int32)

    def prefill(params: Any, tokens_BxP: jax.Array, start_B: jax.Array):
      cache = model.init_cache(sizes.batch_size, whole_length(sizes.context), start_B)
      logits_BxV, cache = model.decode(params, tokens_BxP, cache, rope_theta=theta)
      return logits_BxV, cache._asdict()

    def decode(params: Any, tokens_Bx1: jax.Array, cache: dict[str, jax.Array]):
      cache_ = model_lib.Cache(**cache)
      logits_BxV, cache_ = model.decode(params, tokens_Bx1, cache_, rope_theta=theta)
      return logits_BxV, cache_._asdict()

    logits_and_cache = jax.eval_shape(prefill, params, prompt, rows)
    arguments: dict[Callable[..., Any], dict[str, Any]] = {
      prefill: {"params": params, "tokens": prompt, "start": rows},
      decode: {"params": params, "tokens": token, "cache": logits_and_cache[1]},
    }
    outputs = _described(dict(zip(("logits", "cache"), logits_and_cache)))
    return {
      function.__name__: Program(
        export.export(jax.jit(function), platforms=platforms)(*inputs.values()),
        _described(inputs),
        outputs,
      )
      for function, inputs in arguments.items()
    }


def _described(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Name, shape and dtype of every array, in the order of a program's arguments or results."""
  return [
    {
      "name": ".".join([name, *(str(key.key) for key in path)]),
      "shape": list(leaf.shape),
      "dtype": leaf.dtype.name,
    }
    for name, tree in arguments.items()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  ]
