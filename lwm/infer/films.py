"""Films and images as ids of a prompt.

N frames, P codes per frame.
"""

import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from lwm.config.vqgan import VisionLayout
from lwm.data.documents import DocumentBuilder
from lwm.data.tokenizer import Tokenizer
from lwm.errors import UserError
from lwm.vision import decoders
from lwm.vision.codec import Codec
from lwm.vision.decoder_process import Clip, Settings
from lwm.vision.frame_encoder import FrameEncoder

# A film is bad after this many seconds without a frame.
_TIMEOUT = 60.0
_FRAMES_PER_DEVICE = 32
# The first frame alone is shown before this time, in seconds.
_FIRST_FRAME = 0.01


def check_films(paths: Sequence[str | os.PathLike]) -> None:
  """Decodes the first frame of each film and image, before anything that takes long.

  Raises:
    UserError: a file cannot be read.
  """
  settings = decoders.settings(16, 1.0, 1, _TIMEOUT)
  for _ in _decode(paths, settings, end=_FIRST_FRAME):
    pass


def _decode(
  paths: Sequence[str | os.PathLike], settings: Settings, end: float | None = None
) -> Iterator[decoders.Decoded]:
  """Decodes films up to a time in seconds. Raises UserError if one cannot be read."""
  if not paths:
    return
  clips = enumerate(Clip(os.fspath(path), 0.0, end) for path in paths)
  with decoders.Decoders(min(len(paths), os.cpu_count() or 1), settings) as pool:
    for decoded in pool.decode(clips):
      if decoded.problem:
        raise UserError(f"{paths[decoded.film]} cannot be used: {decoded.problem.rstrip('.')}.")
      yield decoded


def read_codes(
  paths: Sequence[str | os.PathLike],
  codec: Codec,
  devices: Sequence[jax.Device],
  *,
  frames_per_second: float,
  max_frames: int,
) -> list[np.ndarray]:
  """The codes of films and images, encoded on all devices while the films are decoded.

  Args:
    paths: of the files; an image is a film of one frame.
    codec: the VQGAN.
    devices: of this process.
    frames_per_second: frames to take per second of film.
    max_frames: of each film.

  Returns:
    For each film, int32 [N, P].

  Raises:
    UserError: a film cannot be read, or has more than `max_frames` frames.
  """
  blocks: list[list[np.ndarray]] = [[] for _ in paths]
  num_frames = [0] * len(paths)
  encoder = FrameEncoder(codec, devices, _FRAMES_PER_DEVICE)
  # `max_frames` is checked below, because the decoder's message names flags of other programs.
  settings = decoders.settings(codec.config.resolution, frames_per_second, 1 << 30, _TIMEOUT)

  def take(encoded):
    for film, codes_NxP in encoded:
      blocks[film].append(codes_NxP)

  for decoded in _decode(paths, settings):
    if decoded.frames_NxHxWx3 is None:
      continue
    num_frames[decoded.film] += len(decoded.frames_NxHxWx3)
    if num_frames[decoded.film] > max_frames:
      raise UserError(
        f"{paths[decoded.film]} has more than {max_frames:,} frames, which do not fit in the "
        "context: use a longer context, or a lower --frames_per_second."
      )
    take(encoder.add(decoded.film, decoded.frames_NxHxWx3))
  take(encoder.flush())
  return [np.concatenate(own) for own in blocks]


def vision_ids(
  tokenizer: Tokenizer,
  text_vocab_size: int,
  layout: VisionLayout,
  films: Sequence[np.ndarray],
  open_end: bool = False,
) -> np.ndarray:
  """The ids of films: for each, <vision>, its frames and </vision>; int32.

  Args:
    tokenizer: has the marks, or spells them.
    text_vocab_size: text ids of the model, which may be more than the tokenizer's; vision ids
      follow them.
    layout: of the frames.
    films: codes [N, P] of each.
    open_end: whether the model continues the last film: its last frame ends in <eof>, and nothing
      follows it.
  """
  builder = DocumentBuilder(tokenizer, layout)
  for codes_NxP in films:
    builder.vision(codes_NxP)
  ids = builder.build().tokens
  shift = text_vocab_size - tokenizer.vocab_size
  ids = np.where(ids < tokenizer.vocab_size, ids, ids + shift)
  if open_end:
    last = int(np.flatnonzero(ids >= text_vocab_size)[-1])
    ids = ids[: last + 1]
    ids[last] = text_vocab_size + layout.end_of_frame
  return ids
