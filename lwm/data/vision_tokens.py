"""Frames of codes to vision ids and back.

N frames, P codes per frame, both of the layout of the VQGAN (lwm/config/vqgan.py).

A frame is its codes, row by row, and one end mark: <eof> after each frame except the last, <eov>
after the last (LWM's `lwm/data.py`; a single image ends in <eov>). So N frames take N (P + 1)
tokens.
"""

import numpy as np

from lwm.config.vqgan import LWM_LAYOUT, VisionLayout

VISION_START = "<vision>"
VISION_END = "</vision>"


def evenly_spaced(num_frames: int, max_frames: int | None) -> np.ndarray:
  """The indices of at most `max_frames` frames spread evenly from the first to the last, as in LWM.

  All frames if `max_frames` is None or no smaller than `num_frames`.
  """
  if max_frames is None or num_frames <= max_frames:
    return np.arange(num_frames)
  return np.linspace(0, num_frames - 1, max_frames, dtype=int)


def frame_tokens(codes_NxP: np.ndarray, layout: VisionLayout = LWM_LAYOUT) -> np.ndarray:
  """Frames as vision ids with their end marks.

  Args:
    codes_NxP: integers in [0, layout.end_of_frame), N >= 1.
    layout: of the VQGAN that the codes come from.

  Returns:
    int32 [N (P + 1)].

  Raises:
    ValueError: no frames, the wrong number of codes in a frame, or a code out of range.
  """
  codes_NxP = np.asarray(codes_NxP)
  if codes_NxP.ndim != 2 or codes_NxP.shape[1] != layout.codes_per_frame or not len(codes_NxP):
    raise ValueError(
      f"vision codes of shape {codes_NxP.shape} are not one or more frames of "
      f"{layout.codes_per_frame}"
    )
  if codes_NxP.dtype.kind not in "iu":
    raise ValueError(f"vision codes are {codes_NxP.dtype}, not integers")
  if codes_NxP.min() < 0 or codes_NxP.max() >= layout.end_of_frame:
    wrong = codes_NxP[(codes_NxP < 0) | (codes_NxP >= layout.end_of_frame)][0]
    raise ValueError(f"vision code {wrong} is not in [0, {layout.end_of_frame})")
  tokens = np.full((len(codes_NxP), layout.tokens_per_frame), layout.end_of_frame, np.int32)
  tokens[:, :-1] = codes_NxP
  tokens[-1, -1] = layout.end_of_vision
  return tokens.reshape(-1)


def frame_codes(tokens: np.ndarray, layout: VisionLayout = LWM_LAYOUT) -> np.ndarray:
  """The inverse of `frame_tokens`: int32 [N, P] from vision ids [N (P + 1)].

  Raises:
    ValueError: the tokens are not whole frames, an end mark is missing, or an end mark stands among
      the codes.
  """
  tokens = np.asarray(tokens)
  if not len(tokens) or len(tokens) % layout.tokens_per_frame:
    raise ValueError(f"{len(tokens)} vision tokens are not frames of {layout.tokens_per_frame}")
  frames = tokens.reshape(-1, layout.tokens_per_frame).astype(np.int32)
  marks = np.full(len(frames), layout.end_of_frame)
  marks[-1] = layout.end_of_vision
  if (frames[:, -1] != marks).any():
    raise ValueError("a frame does not end in <eof>, or the last does not end in <eov>")
  if (frames[:, :-1] >= layout.end_of_frame).any():
    raise ValueError("an end mark stands among a frame's codes")
  return frames[:, :-1]
