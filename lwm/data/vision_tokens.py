"""How frames stand in a token sequence: the one place that knows LWM's vision layout.

N frames, P = 256 codes in a frame (a 16 x 16 grid, row by row).

A frame is its 256 codes and one end mark: <eof> after each frame but the last, <eov> after the last
in its place (LWM's `lwm/data.py`; a single image ends in <eov>). So N frames take 257 N tokens.
Codes and marks are ids of the vision range; in the model's id space they follow the text ids.
"""

import numpy as np

CODES_PER_FRAME = 256
TOKENS_PER_FRAME = CODES_PER_FRAME + 1
CODEBOOK_SIZE = 8192
END_OF_FRAME = 8192
END_OF_VISION = 8193
# Rounded up by LWM; codes 8194 and above are never used.
VISION_VOCAB_SIZE = 8448
VISION_START = "<vision>"
VISION_END = "</vision>"


def frame_tokens(codes_NxP: np.ndarray) -> np.ndarray:
  """Frames as vision ids with their end marks.

  Args:
    codes_NxP: integers in [0, 8192), N >= 1.

  Returns:
    int32 [257 N], in [0, VISION_VOCAB_SIZE).

  Raises:
    ValueError: no frames, the wrong number of codes in a frame, or a code out of range.
  """
  codes_NxP = np.asarray(codes_NxP)
  if codes_NxP.ndim != 2 or codes_NxP.shape[1] != CODES_PER_FRAME or not len(codes_NxP):
    raise ValueError(
      f"vision codes of shape {codes_NxP.shape} are not one or more frames of {CODES_PER_FRAME}"
    )
  if codes_NxP.dtype.kind not in "iu":
    raise ValueError(f"vision codes are {codes_NxP.dtype}, not integers")
  if codes_NxP.min() < 0 or codes_NxP.max() >= CODEBOOK_SIZE:
    wrong = codes_NxP[(codes_NxP < 0) | (codes_NxP >= CODEBOOK_SIZE)][0]
    raise ValueError(f"vision code {wrong} is not in [0, {CODEBOOK_SIZE})")
  tokens = np.full((len(codes_NxP), TOKENS_PER_FRAME), END_OF_FRAME, np.int32)
  tokens[:, :-1] = codes_NxP
  tokens[-1, -1] = END_OF_VISION
  return tokens.reshape(-1)


def frame_codes(tokens: np.ndarray) -> np.ndarray:
  """The inverse of `frame_tokens`: int32 [N, 256] from vision ids [257 N].

  Raises:
    ValueError: the length is no multiple of 257, an end mark is missing, or one stands among codes.
  """
  tokens = np.asarray(tokens)
  if not len(tokens) or len(tokens) % TOKENS_PER_FRAME:
    raise ValueError(f"{len(tokens)} vision tokens are not frames of {TOKENS_PER_FRAME}")
  frames = tokens.reshape(-1, TOKENS_PER_FRAME).astype(np.int32)
  marks = np.full(len(frames), END_OF_FRAME)
  marks[-1] = END_OF_VISION
  if (frames[:, -1] != marks).any():
    raise ValueError("a frame does not end in <eof>, or the last does not end in <eov>")
  if (frames[:, :-1] >= CODEBOOK_SIZE).any():
    raise ValueError("an end mark stands among a frame's codes")
  return frames[:, :-1]
