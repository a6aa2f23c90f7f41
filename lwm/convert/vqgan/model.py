"""VQGANs of others: LWM's pickle in, diffusers' `VQModel` in and out.

LWM's VQGAN and the one of aMUSEd, which diffusers has as `VQModel`, are the network of
lwm/vision/vqgan.py. LWM's convolutions are [height, width, in, out] as ours, diffusers' are [out,
in, height, width].

A pickle does not say the size of a frame or the range of its pixels; they are LWM's. A `VQModel`
does not say the range either. We add it to those that we write, and it has to be given for others.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from lwm.checkpoint.arrays import ArrayInfo
from lwm.checkpoint.parameters import unfinished
from lwm.config.vqgan import PIXEL_RANGES, VQGANConfig
from lwm.convert.safetensors import SHARD_BYTES, SafetensorsSink, SafetensorsSource, read_json
from lwm.convert.vqgan.pickle_file import read_pickle
from lwm.errors import UserError
from lwm.vision.codec import Codec, save_vqgan
from lwm.vision.vqgan import VQGAN

_CONFIG = "config.json"
# diffusers' name for the file of weights, without its ending.
_STEM = "diffusion_pytorch_model"
# The first byte of a pickle of protocol 2 or newer.
_PICKLE = b"\x80"
_CLASS = "VQModel"
# flax's default, which LWM's network has everywhere.
_LWM_NORM_GROUPS = 32
# Settings of VQModel that our network has one value of, and their defaults in diffusers.
_FIXED: dict[str, tuple[Any, Any]] = {
  "in_channels": (3, 3),
  "out_channels": (3, 3),
  "act_fn": ("silu", "silu"),
  "norm_type": ("group", "group"),
  "mid_block_add_attention": (False, True),
}
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


class _Names(NamedTuple):
  """One module, or one array, by everyone's name."""

  ours: str
  lwm: str
  diffusers: str


_ENDS = (
  _Names("stem", "Conv_0", "conv_in"),
  _Names("norm", "GroupNorm_0", "conv_norm_out"),
  _Names("head", "Conv_1", "conv_out"),
)
_RESIDUAL = (
  _Names("norm1", "GroupNorm_0", "norm1"),
  _Names("conv1", "Conv_0", "conv1"),
  _Names("norm2", "GroupNorm_1", "norm2"),
  _Names("conv2", "Conv_1", "conv2"),
  # Only where the channels change.
  _Names("shortcut", "Conv_2", "conv_shortcut"),
)
# Our names for the arrays of a module, and diffusers'. LWM's are ours.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _level_layers(config: VQGANConfig, side: str) -> Iterator[_Names]:
  """The layers of all levels in their order; `ours` is the kind of the layer."""
  lwm, theirs, resample, resamplers, blocks = {
    "encoder": ("Downsampling", "down", "Downsample", "downsamplers", config.num_res_blocks),
    "decoder": ("Upsampling", "up", "Upsample", "upsamplers", config.num_res_blocks + 1),
  }[side]
  for level in range(len(config.level_channels)):
    for block in range(blocks):
      yield _Names(
        "residual",
        f"{lwm}Block_{level}/ResnetBlock_{block}",
        f"{theirs}_blocks.{level}.resnets.{block}",
      )
    if level < len(config.level_channels) - 1:
      yield _Names(
        "resample",
        f"{lwm}Block_{level}/{resample}_0/Conv_0",
        f"{theirs}_blocks.{level}.{resamplers}.0.conv",
      )


def _modules(config: VQGANConfig) -> Iterator[_Names]:
  """All modules that have arrays; shortcuts in every block, whether it has one or not."""
  yield from (_Names(name, name, name) for name in ("quant_conv", "post_quant_conv"))
  middle = [
    _Names("residual", f"MidBlock_0/ResnetBlock_{block}", f"mid_block.resnets.{block}")
    for block in range(2)
  ]
  levels = {side: list(_level_layers(config, side)) for side in ("encoder", "decoder")}
  layers = {"encoder": levels["encoder"] + middle, "decoder": middle + levels["decoder"]}
  for side in layers:
    for end in _ENDS:
      yield _Names(f"{side}.{end.ours}", f"{side}/{end.lwm}", f"{side}.{end.diffusers}")
    for index, layer in enumerate(layers[side]):
      ours, lwm, diffusers = f"{side}.layers.{index}", f"{side}/{layer.lwm}", layer.diffusers
      if layer.ours == "resample":
        yield _Names(f"{ours}.conv", lwm, f"{side}.{diffusers}")
        continue
      for part in _RESIDUAL:
        yield _Names(
          f"{ours}.{part.ours}", f"{lwm}/{part.lwm}", f"{side}.{diffusers}.{part.diffusers}"
        )


def _arrays(config: VQGANConfig) -> dict[_Names, tuple[int, ...]]:
  """The table: every array's names and our shape."""
  shapes = {
    ".".join(map(str, keys)): variable.shape for keys, variable in nnx.to_flat_state(_state(config))
  }
  table = [_Names("codebook", "quantize/embeddings", "quantize.embedding.weight")]
  table += [
    _Names(f"{module.ours}.{ours}", f"{module.lwm}/{ours}", f"{module.diffusers}.{theirs}")
    for module in _modules(config)
    for ours, theirs in _LEAVES.items()
    if f"{module.ours}.{ours}" in shapes
  ]
  assert {names.ours for names in table} == shapes.keys()
  return {names: shapes[names.ours] for names in table}


def _state(config: VQGANConfig) -> nnx.State:
  """The variables of the network, as shapes."""
  return nnx.state(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0))))


def is_vqgan(path: pathlib.Path) -> bool:
  """Whether a path is a pickle or the directory of a VQModel."""
  if path.is_dir():
    config = path / _CONFIG
    return config.is_file() and read_json(config).get("_class_name") == _CLASS
  if not path.is_file():
    return False
  with open(path, "rb") as file:
    return file.read(1) == _PICKLE


def import_vqgan(
  path: pathlib.Path,
  output: pathlib.Path,
  pixel_range: tuple[int, int] | None = None,
  resolution: int | None = None,
) -> VQGANConfig:
  """Converts a VQGAN to a file that `lwm.vision.Codec` reads.

  Args:
    path: LWM's pickle, or the directory of a VQModel.
    output: the .npz file.
    pixel_range: values of black and of white. None: what a VQModel records, or LWM's for a pickle.
    resolution: pixels along each side of a frame. None: what a VQModel of ours records, or 256.

  Returns:
    The sizes of the VQGAN.

  Raises:
    UserError: it is damaged or another network, or its pixel range is not known. Nothing in it is
      executed and nothing is written.
  """
  if output.exists():
    raise UserError(f"{output} exists: name another --output, or remove it.")
  if path.is_dir():
    settings = read_json(path / _CONFIG)
    config = _diffusers_config(path / _CONFIG, settings)
    recorded = settings.get("pixel_range"), settings.get("resolution")
    source = SafetensorsSource(path, _STEM)
    tensors = {name: source.read(name) for name in source.tensors}
    column = "diffusers"
  else:
    tensors = read_pickle(path)
    config = _lwm_config(path, tensors)
    recorded = None, None
    pixel_range = pixel_range or PIXEL_RANGES[0]
    column = "lwm"
  config.pixel_range = _setting(path, "pixel_range", pixel_range, recorded[0])
  config.resolution = _setting(path, "resolution", resolution, recorded[1], default=256)
  try:
    config.validate()
  except ValueError as error:
    raise UserError(f"{path} is not a VQGAN that can be imported: {error}") from error
  save_vqgan(output, config, _to_ours(path, config, tensors, column))
  return config


def _setting(path: pathlib.Path, name: str, given: Any, recorded: Any, default: Any = None) -> Any:
  """A setting from its flag or its record, which must not contradict each other."""
  recorded = tuple(recorded) if isinstance(recorded, list) else recorded
  if given is not None and recorded is not None and given != recorded:
    raise UserError(f"{path} records {name} {recorded}, but --{name} is {given}: leave it out.")
  value = given or recorded or default
  if value is None:
    raise UserError(
      f"{path} does not say what range its pixels have: give --{name}=0,1 (aMUSEd) or "
      f"--{name}=-1,1 (LWM)."
    )
  return value


def _lwm_config(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> VQGANConfig:
  """The sizes of LWM's network, from the shapes of its tensors."""

  def shape(name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors or tensors[name].ndim != dimensions:
      raise UserError(f"{path} lacks the tensor {name} of LWM's VQGAN: get the file again.")
    return tensors[name].shape

  def count(prefix: str) -> int:
    rest = {name.removeprefix(prefix).split("/")[0] for name in tensors if name.startswith(prefix)}
    return max(len(rest), 1)

  hidden = shape("encoder/Conv_0/kernel", 4)[-1]
  channels = [
    shape(f"encoder/DownsamplingBlock_{level}/ResnetBlock_0/Conv_0/kernel", 4)[-1]
    for level in range(count("encoder/DownsamplingBlock_"))
  ]
  codebook_size, codebook_width = shape("quantize/embeddings", 2)
  return VQGANConfig(
    hidden_channels=hidden,
    channel_multipliers=_multipliers(path, hidden, channels),
    num_res_blocks=count("encoder/DownsamplingBlock_0/ResnetBlock_"),
    latent_channels=shape("encoder/Conv_1/kernel", 4)[-1],
    codebook_size=codebook_size,
    codebook_width=codebook_width,
    norm_groups=_LWM_NORM_GROUPS,
  )


def _multipliers(path: pathlib.Path, hidden: int, channels: list[int]) -> tuple[int, ...]:
  if not hidden or any(width % hidden for width in channels):
    raise UserError(
      f"{path}: the channels {channels} of the levels are no multiples of {hidden}, the channels "
      "of the first convolution, so it is another network than LWM's VQGAN."
    )
  return tuple(width // hidden for width in channels)


def _diffusers_config(path: pathlib.Path, settings: Mapping[str, Any]) -> VQGANConfig:
  """The sizes in a VQModel's config.json; what it leaves out has diffusers' defaults."""
  if settings.get("_class_name") != _CLASS:
    raise UserError(f"{path} is not of a {_CLASS}: name the directory of one.")
  fixed = {name: settings.get(name, default) for name, (_, default) in _FIXED.items()}
  wrong = [name for name, (ours, _) in _FIXED.items() if fixed[name] != ours]
  channels = settings.get("block_out_channels", [64])
  for name, block in {"down_block_types": _DOWN, "up_block_types": _UP}.items():
    if not isinstance(channels, list) or settings.get(name, [block]) != [block] * len(channels):
      wrong.append(name)
  if wrong:
    raise UserError(
      f"{path}: {wrong[0]}={settings.get(wrong[0])!r} is not in LWM's and aMUSEd's network, which "
      "is the only VQModel that can be imported."
    )
  sizes = {
    "num_res_blocks": settings.get("layers_per_block", 1),
    "latent_channels": settings.get("latent_channels", 3),
    "codebook_size": settings.get("num_vq_embeddings", 256),
    "norm_groups": settings.get("norm_num_groups", 32),
  }
  sizes["codebook_width"] = settings.get("vq_embed_dim") or sizes["latent_channels"]
  if not channels or not all(
    type(size) is int and size > 0 for size in [*channels, *sizes.values()]
  ):
    raise UserError(f"{path}: its sizes are not whole numbers: get the file again.")
  return VQGANConfig(
    hidden_channels=channels[0],
    channel_multipliers=_multipliers(path, channels[0], channels),
    **sizes,
  )


def _to_ours(
  path: pathlib.Path, config: VQGANConfig, tensors: Mapping[str, np.ndarray], column: str
) -> nnx.State:
  """The network's variables from the tensors that `column` of the table names."""
  table = _arrays(config)
  names = {getattr(row, column): row.ours for row in table}
  if missing := sorted(names.keys() - tensors.keys()):
    raise UserError(f"{path} lacks the tensor {missing[0]}: get all files of the VQGAN.")
  if unknown := sorted(tensors.keys() - names.keys()):
    raise UserError(
      f"{path} holds the tensor {unknown[0]}, which LWM's and aMUSEd's network do not have: a "
      "tensor that is not read is lost."
    )
  shapes = {row.ours: shape for row, shape in table.items()}
  arrays = {}
  for theirs, ours in names.items():
    array, shape = tensors[theirs], shapes[ours]
    if column == "diffusers" and array.ndim == 4:
      array = array.transpose(2, 3, 1, 0)
    if array.shape != shape:
      raise UserError(
        f"{path}: the tensor {theirs} has shape {tensors[theirs].shape}, which does not fit the "
        "other tensors: get all files of the VQGAN."
      )
    arrays[ours] = np.ascontiguousarray(array, np.float32)
  flat = nnx.to_flat_state(_state(config))
  for keys, variable in flat:
    variable.set_value(arrays[".".join(map(str, keys))])
  return nnx.from_flat_state(flat)


def export_vqgan(path: pathlib.Path, output: pathlib.Path) -> None:
  """Writes a VQGAN as the directory of a `VQModel`; see `write_vqmodel`.

  Args:
    path: a file that `lwm.vision.save_vqgan` wrote.
    output: the directory.

  Raises:
    UserError: VQModel cannot be this network, or the directory exists or cannot be written.
  """
  with unfinished(output) as new:
    write_vqmodel(Codec(path), new)


def write_vqmodel(codec: Codec, directory: pathlib.Path) -> None:
  """Writes what diffusers' `VQModel.from_pretrained` loads.

  Its config.json has two more settings, which are ours: `pixel_range` and `resolution`.

  Args:
    codec: the VQGAN.
    directory: exists.

  Raises:
    UserError: VQModel cannot be this network.
  """
  config = codec.config
  if config.channel_multipliers[0] != 1 or not config.num_res_blocks:
    raise UserError(
      f"{codec.path}: channel_multipliers={config.channel_multipliers} with num_res_blocks="
      f"{config.num_res_blocks} is no VQModel of diffusers, which begins with the channels of its "
      "first level and has residual blocks in every level: train one of that form."
    )
  levels = len(config.level_channels)
  settings = {
    "_class_name": _CLASS,
    **{name: ours for name, (ours, _) in _FIXED.items()},
    "down_block_types": [_DOWN] * levels,
    "up_block_types": [_UP] * levels,
    "block_out_channels": config.level_channels,
    "layers_per_block": config.num_res_blocks,
    "latent_channels": config.latent_channels,
    "norm_num_groups": config.norm_groups,
    "num_vq_embeddings": config.codebook_size,
    "vq_embed_dim": config.codebook_width,
    "lookup_from_codebook": True,
    "pixel_range": config.pixel_range,
    "resolution": config.resolution,
  }
  (directory / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
  flat = {".".join(map(str, keys)): variable for keys, variable in nnx.to_flat_state(codec.state)}
  tensors = {}
  for row in _arrays(config):
    array = np.asarray(flat[row.ours][...])
    tensors[row.diffusers] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
  infos = {name: ArrayInfo(array.shape, array.dtype) for name, array in tensors.items()}
  with SafetensorsSink(directory, infos, SHARD_BYTES, _STEM) as sink:
    for name, array in tensors.items():
      sink.write(name, array)
