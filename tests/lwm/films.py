"""Small films for tests, good ones and hostile ones."""

import os
import pathlib
import threading
import wave

import av
import numpy as np
from flax import nnx
from PIL import Image

from lwm.config.vqgan import VQGANConfig
from lwm.vision.codec import save_vqgan
from lwm.vision.vqgan import VQGAN

TINY_VQGAN = VQGANConfig(
  resolution=32,
  hidden_channels=8,
  channel_multipliers=(1, 1, 2),
  num_res_blocks=1,
  latent_channels=8,
  codebook_size=64,
  codebook_width=4,
  norm_groups=4,
)


def write_vqgan(path: pathlib.Path) -> pathlib.Path:
  save_vqgan(path, TINY_VQGAN, nnx.state(VQGAN(TINY_VQGAN, rngs=nnx.Rngs(0))))
  return path


def frames(count: int, seed: int = 0, size: tuple[int, int] = (48, 64)) -> np.ndarray:
  """A coloured gradient that moves."""
  rows, columns = np.mgrid[: size[0], : size[1]]
  phase = 11 * np.arange(count)[:, None, None] + 40 * seed
  channels = [rows * 3 + phase, columns * 3 + 2 * phase, rows + columns + 50 * seed + 0 * phase]
  return (np.stack(channels, -1) % 256).astype(np.uint8)


def write_film(
  path: pathlib.Path,
  count: int = 12,
  seed: int = 0,
  size=(48, 64),
  codec="mpeg4",
  pix_fmt="yuv420p",
  **options,
) -> pathlib.Path:
  """Eight frames a second; `options` go to `av.open`."""
  with av.open(str(path), "w", **options) as container:
    stream = container.add_stream(codec, rate=8)
    stream.height, stream.width = size
    stream.pix_fmt = pix_fmt
    container.start_encoding()
    for pixels in frames(count, seed, size):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode())
  return path


def write_sound(path: pathlib.Path) -> pathlib.Path:
  with wave.open(str(path), "wb") as file:
    file.setparams((1, 2, 8000, 0, "NONE", ""))
    file.writeframes(bytes(4000))
  return path


def write_huge_image(path: pathlib.Path) -> pathlib.Path:
  """A few bytes that claim to be an image of 10 gigapixels."""
  Image.new("L", (8, 8)).save(path, format="PNG")
  content = bytearray(path.read_bytes())
  content[16:24] = (100_000).to_bytes(4) * 2
  path.write_bytes(content)
  return path


def start_endless(path: pathlib.Path) -> pathlib.Path:
  """A pipe that repeats a film for as long as it is read."""
  film = write_film(path.with_name(path.name + ".ts"), 25)
  content = film.read_bytes()
  film.unlink()
  os.mkfifo(path)

  def feed() -> None:
    try:
      with open(path, "wb") as pipe:
        while True:
          pipe.write(content)
    except OSError:
      pass

  threading.Thread(target=feed, daemon=True).start()
  return path
