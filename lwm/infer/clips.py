"""A held-out clip in two parts: its first frames are given, the frames after them are predicted.

N frames, P codes per frame.
"""

from typing import NamedTuple

import numpy as np

from lwm.config.vqgan import VisionLayout
from lwm.errors import UserError


class Clip(NamedTuple):
  """A video document, cut.

  Attributes:
    prompt: int32; the document up to the <eof> of the last given frame, or up to the clip.
    codes_NxP: int32; the codes of all true frames, given ones first.
  """

  prompt: np.ndarray
  codes_NxP: np.ndarray


def cut_clip(
  tokens: np.ndarray, text_vocab_size: int, layout: VisionLayout, given: int, predicted: int
) -> Clip:
  """Cuts a document after its `given`-th frame.

  Args:
    tokens: int32 ids of the document; its first vision ids, up to the next text, are the clip.
    text_vocab_size: number of text ids; vision ids follow them.
    layout: of the clip's frames.
    given: frames in the prompt; without any, it ends after <vision>.
    predicted: frames to predict.

  Raises:
    UserError: the clip has fewer frames.
  """
  # Where text and vision change. The document may hold other clips and images after the first.
  first, end = np.flatnonzero(np.diff(tokens >= text_vocab_size, prepend=False, append=False))[:2]
  frames = (end - first) // layout.tokens_per_frame
  if frames < given + predicted:
    raise UserError(
      f"The clip has {frames} frames, fewer than {given} given + {predicted} predicted: set "
      "--given_frames and --frames so that they fit, or take another --clip."
    )
  stop = first + given * layout.tokens_per_frame
  ids = tokens[first : first + (given + predicted) * layout.tokens_per_frame]
  return Clip(tokens[:stop], sampled_codes(ids, text_vocab_size, layout))


def sampled_codes(tokens: np.ndarray, text_vocab_size: int, layout: VisionLayout) -> np.ndarray:
  """Codes [N, P] of sampled frames, from ids [N (P + 1)]; the end marks are left out."""
  return tokens.reshape(-1, layout.tokens_per_frame)[:, :-1] - text_vocab_size
