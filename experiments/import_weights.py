"""Imports a model of another codebase as a checkpoint of this one.

    python -m experiments.import_weights --input=Llama-3.1-8B --output=weights/llama3_8b
    python -m experiments.import_weights --input=model.gguf --output=weights/smollm2
    python -m experiments.import_weights --input=params::LWM-Text-1M/params --preset=lwm-text-1m \\
        --output=weights/lwm_text_1m
    python -m experiments.import_weights --input=LWM-1M/vqgan --output=weights/vqgan.npz

--input is a Hugging Face directory with safetensors files, a GGUF file, or a release of LWM's
(docs/lwm_weights.md). --output becomes a checkpoint: give it to --config.init_from of
experiments.train, or to --workdir of experiments.generate and experiments.export_weights.
Parameters keep their dtype; quantised ones become float32. OUTPUT/manifest.json has the SHA-256 of
every tensor.

--input may also be a VQGAN: LWM's pickle, or the directory of a VQModel of diffusers. --output is
then the .npz file that `lwm.vision.Codec` reads and experiments.generate takes with --vqgan. Or it
is the directory of a LoRA adapter in PEFT's format; --base is then the checkpoint of its base.
"""

import pathlib

from absl import flags

from experiments import flags as experiment_flags
from lwm import convert
from lwm.checkpoint.reader import newest
from lwm.config.vqgan import PIXEL_RANGES
from lwm.errors import UserError

_INPUT = flags.DEFINE_string("input", None, "The model: a directory, a file, or KIND::FILE.")
_OUTPUT = flags.DEFINE_string(
  "output", None, "The checkpoint to write, a new directory; of a VQGAN, a new .npz file."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "The tokenizer's file, *.model or tokenizer.json. Default: the input's own."
)
_BASE = flags.DEFINE_string("base", None, "The checkpoint of an adapter's base.")
_PRESET = flags.DEFINE_string("preset", None, "Name of an LWM release: lwm-text-1m.")
_ROPE_THETA = flags.DEFINE_float("rope_theta", None, "RoPE base of an LWM release.")
_CONTEXT = flags.DEFINE_integer("context", None, "Context of an LWM release, in tokens.")
_NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Attention heads of an LWM release.")
_RANGES = [f"{low},{high}" for low, high in PIXEL_RANGES]
_PIXEL_RANGE = flags.DEFINE_enum(
  "pixel_range",
  None,
  _RANGES,
  "Pixel values of black and white for a VQGAN: -1,1 (LWM) or 0,1 (aMUSEd). Default: those that "
  "the VQGAN records, or -1,1 for LWM's pickle.",
)
_RESOLUTION = flags.DEFINE_integer(
  "resolution",
  None,
  "Pixels along each side of a VQGAN's frames. Default: what it records, or 256.",
  1,
)
flags.mark_flags_as_required(["input", "output"])


def vqgan(path: pathlib.Path, output: pathlib.Path) -> None:
  pixel_range = PIXEL_RANGES[_RANGES.index(_PIXEL_RANGE.value)] if _PIXEL_RANGE.value else None
  config = convert.import_vqgan(path, output, pixel_range, _RESOLUTION.value)
  print(f"{path}: {config} is in {output}")


def adapter(path: pathlib.Path, output: pathlib.Path) -> None:
  if not _BASE.value:
    raise UserError(f"{path} is an adapter: name the checkpoint of its base with --base.")
  convert.import_adapter(path, newest(pathlib.Path(_BASE.value)), output)
  print(f"{path}: the adapter and its base are in {output}")


def main(argv: list[str]) -> None:
  del argv
  if not _INPUT.value or not _OUTPUT.value:
    raise UserError("--input and --output must not be empty.")
  path, output = pathlib.Path(_INPUT.value), pathlib.Path(_OUTPUT.value)
  if convert.is_vqgan(path):
    vqgan(path, output)
    return
  if convert.is_adapter(path):
    adapter(path, output)
    return
  options = convert.ReleaseOptions(
    preset=_PRESET.value,
    rope_theta=_ROPE_THETA.value,
    context=_CONTEXT.value,
    num_heads=_NUM_HEADS.value,
    tokenizer=pathlib.Path(_TOKENIZER.value) if _TOKENIZER.value else None,
  )
  weights = convert.read_weights(_INPUT.value, options)
  convert.import_weights(weights, output)
  print(f"{weights.name}: {len(weights.table)} tensors are in {output}")


if __name__ == "__main__":
  experiment_flags.run(main)
