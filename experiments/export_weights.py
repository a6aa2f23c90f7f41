"""Exports a checkpoint for other programs.

    python -m experiments.export_weights --workdir=runs/mine --format=hugging_face --output=mine_hf
    python -m experiments.export_weights --workdir=runs/mine --format=gguf --type=Q8_0 \\
        --output=mine.gguf

--workdir is a run's, one of its checkpoints, or imported weights. LoRA's additions are merged into
the kernels, and the padding rows of the vocabulary are removed. --format is one of:

  hugging_face  a directory for transformers and vLLM; a model with vision ids needs --vqgan, which
                is put beside it as a VQModel of diffusers
  gguf          a file for llama.cpp and its kin, of --type F32, F16, BF16, Q8_0, Q4_0 or Q4_1
  orbax         the parameters alone, for any program with Orbax
  stablehlo     programs of prefill and decode that PJRT compiles, for runtimes without Python
  lwm           a stream that LWM's programs load
  adapter       LoRA's additions alone, in PEFT's format
  vqgan         the .npz file of a VQGAN's run, which --vqgan of all programs reads
"""

import pathlib
from collections.abc import Callable

import numpy as np
from absl import flags

from experiments import flags as experiment_flags
from lwm import convert
from lwm.checkpoint.reader import StoredCheckpoint, newest
from lwm.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "A run, a checkpoint or imported weights.")
_OUTPUT = flags.DEFINE_string("output", None, "The directory or file to write; must not exist.")
_FORMAT = flags.DEFINE_string("format", None, "The format to write, from the list above.")
_TYPE = flags.DEFINE_string(
  "type",
  None,
  "Type of the numbers: float32, bfloat16 or float16; for GGUF, see above. Default: as they are "
  "stored, which is float32 for what was trained here; for GGUF, F16.",
)
_BASE = flags.DEFINE_string(
  "base",
  "",
  "--format=adapter: path or name of the base model in transformers' format. The adapter records "
  "it, and PEFT loads it.",
)
_VQGAN = flags.DEFINE_string("vqgan", None, "The VQGAN of a model with vision ids.")
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "Size of a file of safetensors, in GB.", 1e-3)
_BATCH = flags.DEFINE_integer("batch_size", 1, "StableHLO: rows of a batch.", 1)
_PROMPT = flags.DEFINE_integer("prompt_length", 128, "StableHLO: tokens of a prompt.", 1)
_CONTEXT = flags.DEFINE_integer("context", 2048, "StableHLO: tokens in the cache.", 1)
_PLATFORMS = flags.DEFINE_list("platforms", "cpu", "StableHLO: any of cpu, cuda, tpu.")
flags.mark_flags_as_required(["workdir", "output", "format"])

DTYPES = ("float32", "bfloat16", "float16")


def hugging_face(stored: StoredCheckpoint, output: pathlib.Path) -> None:
  vqgan = pathlib.Path(_VQGAN.value) if _VQGAN.value else None
  shard_bytes = int(_SHARD_GB.value * 1e9)
  convert.export_hugging_face(stored, output, _dtype(), shard_bytes, vqgan)


def gguf(stored: StoredCheckpoint, output: pathlib.Path) -> None:
  for note in convert.export_gguf(stored, output, _TYPE.value or "F16"):
    print(f"note: {note}")


def orbax(stored: StoredCheckpoint, output: pathlib.Path) -> None:
  convert.export_orbax(stored, output, _dtype())


def stablehlo(stored: StoredCheckpoint, output: pathlib.Path) -> None:
  if unknown := [name for name in _PLATFORMS.value if name not in ("cpu", "cuda", "tpu")]:
    raise UserError(f"--platforms={unknown[0]} is not one of cpu, cuda, tpu.")
  if _PROMPT.value >= _CONTEXT.value:
    raise UserError(
      f"--prompt_length={_PROMPT.value} must be less than --context={_CONTEXT.value}, which the "
      "continuation shares."
    )
  sizes = convert.Sizes(_BATCH.value, _PROMPT.value, _CONTEXT.value)
  convert.export_programs(stored, output, sizes, _dtype() or "float32", _PLATFORMS.value)


def lwm(stored: StoredCheckpoint, output: pathlib.Path) -> None:
  convert.export_release(stored, output, np.dtype(_dtype()) if _dtype() else None)


def adapter(stored: StoredCheckpoint, output: pathlib.Path) -> None:
  convert.export_adapter(stored, output, _BASE.value)


def vqgan(stored: StoredCheckpoint, output: pathlib.Path) -> None:
  convert.export_trained_vqgan(stored, output)


FORMATS: dict[str, Callable[[StoredCheckpoint, pathlib.Path], None]] = {
  function.__name__: function
  for function in (hugging_face, gguf, orbax, stablehlo, lwm, adapter, vqgan)
}


def _dtype() -> str | None:
  if _TYPE.value not in (None, *DTYPES):
    raise UserError(f"--type={_TYPE.value} is not one of {', '.join(DTYPES)}.")
  return _TYPE.value


def main(argv: list[str]) -> None:
  del argv
  if not _WORKDIR.value or not _OUTPUT.value:
    raise UserError("--workdir and --output must not be empty.")
  if _FORMAT.value not in FORMATS:
    raise UserError(f"--format={_FORMAT.value} is not one of {', '.join(FORMATS)}.")
  stored = newest(pathlib.Path(_WORKDIR.value))
  if _FORMAT.value not in (adapter.__name__, vqgan.__name__):
    stored = convert.merged(stored)
  FORMATS[_FORMAT.value](stored, pathlib.Path(_OUTPUT.value))
  print(f"{stored.path}: exported to {_OUTPUT.value}")


if __name__ == "__main__":
  experiment_flags.run(main)
