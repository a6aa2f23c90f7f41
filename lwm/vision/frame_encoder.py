"""Frames of many films to codes, on all devices of this process.

Legend: N frames, B frames of a batch, H and W height and width in pixels, P codes per frame.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwm.vision.codec import Codec

_DEVICES = "frames"


class Codes(NamedTuple):
  """Consecutive frames of one film as codes, int32 [N, P]."""

  film: int
  codes_NxP: np.ndarray


class FrameEncoder:
  """Encodes frames in full batches that mix the films, spread evenly over the devices.

  Every device runs the same program on the same number of frames, so the codes of a frame depend
  neither on the number of devices nor on the other frames.
  """

  def __init__(self, codec: Codec, devices: Sequence[jax.Device], frames_per_device: int):
    """
    Args:
      codec: the VQGAN.
      devices: of this process.
      frames_per_device: in each batch.
    """
    mesh = Mesh(np.array(devices), (_DEVICES,))
    self._state = jax.device_put(codec.state, NamedSharding(mesh, PartitionSpec()))
    self._sharding = NamedSharding(mesh, PartitionSpec(_DEVICES))
    self._encode = jax.jit(
      jax.shard_map(
        codec.encode_frames,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(_DEVICES)),
        out_specs=PartitionSpec(_DEVICES),
        # The search for the nearest code begins with values that are the same on all devices.
        check_vma=False,
      )
    )
    side = codec.config.resolution
    shape = len(devices) * frames_per_device, side, side, 3
    # One is filled while the devices read the other.
    self._batches = [np.zeros(shape, np.uint8) for _ in range(2)]
    self._films: list[tuple[int, int]] = []
    self._filled = 0
    self._at_work: tuple[jax.Array, list[tuple[int, int]]] | None = None

  def add(self, film: int, frames_NxHxWx3: np.ndarray) -> Iterator[Codes]:
    """Copies frames of a film, and yields the codes of frames that were added before."""
    while len(frames_NxHxWx3):
      batch = self._batches[0]
      taken = min(len(frames_NxHxWx3), len(batch) - self._filled)
      batch[self._filled : self._filled + taken] = frames_NxHxWx3[:taken]
      self._films.append((film, taken))
      self._filled += taken
      frames_NxHxWx3 = frames_NxHxWx3[taken:]
      if self._filled == len(batch):
        yield from self._dispatch()

  def flush(self) -> Iterator[Codes]:
    """Yields the codes of all frames that are left."""
    if self._filled:
      yield from self._dispatch()
    yield from self._collect()

  def _dispatch(self) -> Iterator[Codes]:
    """Starts the batch, and yields the codes of the one before."""
    frames_BxHxWx3 = jax.device_put(self._batches[0], self._sharding)
    started = self._encode(self._state, frames_BxHxWx3), self._films
    self._films, self._filled = [], 0
    yield from self._collect()
    self._at_work = started
    self._batches.reverse()

  def _collect(self) -> Iterator[Codes]:
    if self._at_work is None:
      return
    codes, films = self._at_work
    self._at_work = None
    codes_BxP = np.asarray(codes).reshape(len(codes), -1)
    first = 0
    for film, count in films:
      yield Codes(film, codes_BxP[first : first + count])
      first += count
