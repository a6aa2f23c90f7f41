"""A held-out clip, cut: its first frames are given, those after them are to be predicted.

N frames of P = 256 codes.
"""

from typing import NamedTuple

import numpy as np

from lwm.data.vision_tokens import CODES_PER_FRAME, END_OF_FRAME, TOKENS_PER_FRAME
from lwm.errors import UserError
from lwm.infer.sampling import SAMPLED


class Clip(NamedTuple):
  """A video document, cut.

  Attributes:
    prompt: int32; the document up to the <eof> of the last given frame.
    forced: int32; for each token to come, <eof> where a frame ends, SAMPLED elsewhere.
    codes_NxP: int32; the codes of all true frames, given ones first.
  """

  prompt: np.ndarray
  forced: np.ndarray
  codes_NxP: np.ndarray


def cut_clip(tokens: np.ndarray, text_vocab_size: int, given: int, predicted: int) -> Clip:
  """Cuts a document behind its `given`-th frame.

  Args:
    tokens: int32 ids of the document; its first vision ids, up to the next text, are the clip.
    text_vocab_size: vision ids follow these.
    given: frames in the prompt, at least 1.
    predicted: frames to come.

  Raises:
    UserError: the clip has fewer frames.
  """
  # Where text and vision change: a document may hold other clips and images behind the first.
  first, end = np.flatnonzero(np.diff(tokens >= text_vocab_size, prepend=False, append=False))[:2]
  frames = (end - first) // TOKENS_PER_FRAME
  if frames < given + predicted:
    raise UserError(
      f"The clip has {frames} frames, fewer than {given} given + {predicted} predicted: set "
      "--given_frames and --frames so that they fit, or take another --clip."
    )
  stop = first + given * TOKENS_PER_FRAME
  ids = tokens[first : first + (given + predicted) * TOKENS_PER_FRAME] - text_vocab_size
  forced = np.full((predicted, TOKENS_PER_FRAME), SAMPLED, np.int32)
  forced[:, -1] = text_vocab_size + END_OF_FRAME
  codes_NxP = ids.reshape(-1, TOKENS_PER_FRAME)[:, :CODES_PER_FRAME]
  return Clip(tokens[:stop], forced.reshape(-1), codes_NxP)


def sampled_codes(tokens: np.ndarray, text_vocab_size: int) -> np.ndarray:
  """Codes [N, P] of sampled frames, from ids [257 N]."""
  return tokens.reshape(-1, TOKENS_PER_FRAME)[:, :CODES_PER_FRAME] - text_vocab_size
