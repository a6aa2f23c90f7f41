"""The file of a trained VQGAN, and frames to codes and back with it.

Legend: N frames; H, W height and width in pixels; h, w height and width of the grid.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lwm.config.vqgan import VQGANConfig
from lwm.errors import UserError, disk_error
from lwm.vision.vqgan import VQGAN

# The file's name in the workdir of a VQGAN's run.
FILE_NAME = "vqgan.npz"
_CONFIG = "config"


def to_pixels(frames_NxHxWx3: np.ndarray | jax.Array, pixel_range: tuple[int, int]) -> jax.Array:
  """uint8 frames as float32 pixels in `pixel_range` (low, high)."""
  low, high = pixel_range
  return jnp.asarray(frames_NxHxWx3, jnp.float32) / (255 / (high - low)) + low


def to_frames(pixels_NxHxWx3: jax.Array, pixel_range: tuple[int, int]) -> jax.Array:
  """Pixels in `pixel_range` (low, high) as uint8 frames, clipped and rounded."""
  low, high = pixel_range
  level_NxHxWx3 = (jnp.clip(pixels_NxHxWx3, low, high) - low) * (255 / (high - low))
  return jnp.round(level_NxHxWx3).astype(jnp.uint8)


def save_vqgan(path: str | os.PathLike, config: VQGANConfig, state: nnx.State) -> None:
  """Writes weights and config to one .npz file, which exists complete or not at all.

  Args:
    path: the file; its folder is created.
    config: the sizes of the model.
    state: all variables of the model, as `nnx.state(model)` returns them.

  Raises:
    UserError: the file cannot be written.
  """
  # The config comes first: the order is part of the file's hash.
  arrays = {_CONFIG: np.array(json.dumps(dataclasses.asdict(config)))}
  for keys, value in nnx.to_flat_state(state):
    arrays[".".join(str(key) for key in keys)] = np.asarray(value[...])
  path = pathlib.Path(path)
  unfinished = path.with_name(path.name + ".unfinished")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(unfinished, "wb") as file:
      np.savez(file, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle
    unfinished.rename(path)
  except OSError as error:
    unfinished.unlink(missing_ok=True)
    raise UserError(
      f"{path} could not be written ({disk_error(error)}): fix the disk and run the same command "
      "again."
    ) from error


class Codec:
  """Frames to codes and back with the VQGAN in one file.

  Attributes:
    path: of the file.
    config: the VQGAN's settings.
    state: all of its variables.
    sha256: hash of the file, hexadecimal; datasets record it to name their VQGAN.
    encode_frames: jitted; codes [N, h, w] of uint8 frames, given `state`.
  """

  def __init__(self, path: str | os.PathLike, batch_size: int = 32):
    """Loads a file that `save_vqgan` wrote.

    Args:
      path: the file, or the workdir of a VQGAN's run.
      batch_size: frames per call of the compiled program. The last batch is padded, so one program
        serves all, and a frame's codes do not depend on how many other frames come with it.

    Raises:
      UserError: the file does not exist or is not a VQGAN's.
    """
    path = pathlib.Path(path)
    self.path = path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
      raise UserError(f"There is no VQGAN file {path}: train one with experiments.train.")
    try:
      with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
      settings = json.loads(arrays.pop(_CONFIG).item())
      for name in ("channel_multipliers", "pixel_range"):
        if name in settings:  # Files of older versions have no pixel_range.
          settings[name] = tuple(settings[name])
      self.config = VQGANConfig(**settings)
      model = nnx.eval_shape(lambda: VQGAN(self.config, rngs=nnx.Rngs(0)))
      graph, state = nnx.split(model)
      flat = nnx.to_flat_state(state)
      for keys, variable in flat:
        array = arrays.pop(".".join(str(key) for key in keys))
        if array.shape != variable.shape:
          raise ValueError(f"{'.'.join(map(str, keys))} has shape {array.shape}")
        variable.set_value(jnp.asarray(array))
      if arrays:
        raise ValueError(f"{', '.join(arrays)} is unknown")
    except (KeyError, TypeError, ValueError, OSError, zipfile.BadZipFile) as error:
      raise UserError(f"{path} is not a VQGAN file that this version reads: {error}.") from error
    with open(path, "rb") as file:
      self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    self.state = nnx.from_flat_state(flat)
    self._batch_size = batch_size
    pixel_range = self.config.pixel_range

    @jax.jit
    def encode(state, frames_NxHxWx3):
      return nnx.merge(graph, state).encode(to_pixels(frames_NxHxWx3, pixel_range))

    @jax.jit
    def decode(state, codes_Nxhxw):
      return to_frames(nnx.merge(graph, state).decode(codes_Nxhxw), pixel_range)

    self.encode_frames, self._decode = encode, decode

  def encode(self, frames_NxHxWx3: np.ndarray) -> np.ndarray:
    """Returns codes, int32 [N, h, w], of uint8 frames; N >= 1.

    Raises:
      ValueError: the frames are not uint8 of the VQGAN's resolution.
    """
    frames_NxHxWx3 = np.asarray(frames_NxHxWx3)
    side = self.config.resolution
    if frames_NxHxWx3.shape[1:] != (side, side, 3) or frames_NxHxWx3.dtype != np.uint8:
      raise ValueError(
        f"frames {frames_NxHxWx3.dtype}{list(frames_NxHxWx3.shape)} are not uint8 [N, {side}, "
        f"{side}, 3]"
      )
    return self._in_batches(self.encode_frames, frames_NxHxWx3)

  def decode(self, codes_Nxhxw: np.ndarray) -> np.ndarray:
    """Returns frames, uint8 [N, H, W, 3], of codes [N, h, w] or [N, h w]; N >= 1.

    Raises:
      ValueError: a frame has another number of codes, or a code is out of range.
    """
    codes_Nxhxw = np.asarray(codes_Nxhxw)
    side = self.config.grid
    codes_Nxhxw = codes_Nxhxw.reshape(len(codes_Nxhxw), side, side)
    if codes_Nxhxw.min() < 0 or codes_Nxhxw.max() >= self.config.codebook_size:
      raise ValueError(f"codes are not in [0, {self.config.codebook_size})")
    return self._in_batches(self._decode, codes_Nxhxw.astype(np.int32))

  def _in_batches(self, function, inputs: np.ndarray) -> np.ndarray:
    outputs = []
    for begin in range(0, len(inputs), self._batch_size):
      batch = inputs[begin : begin + self._batch_size]
      padding = [(0, self._batch_size - len(batch))] + [(0, 0)] * (inputs.ndim - 1)
      output = function(self.state, np.pad(batch, padding))
      outputs.append(np.asarray(output)[: len(batch)])
    return np.concatenate(outputs)
