"""Documents of films, in pieces: a film of any length is never in memory as a whole.

N frames, P codes per frame, C clips of a document.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lwm.config.vqgan import VisionLayout
from lwm.data.chat import ChatFormat
from lwm.data.documents import Document, DocumentBuilder, choose, happens, video_document
from lwm.data.films import Film
from lwm.data.tokenizer import Tokenizer
from lwm.data.vision_tokens import evenly_spaced, frame_tokens


@dataclasses.dataclass(frozen=True)
class RowSettings:
  """What becomes of films and their captions.

  All draws depend on the seed and the manifest's entry only, not on the order of the work.

  Attributes:
    seed: of all draws.
    caption_last: probability that a caption follows its frames, so that the loss counts the caption
      and not the frames. LWM swaps half of the pairs.
    caption_dropout: probability that a film whose caption would come first loses it, for
      classifier-free guidance: its prompt is then <bos> <vision>.
    max_frames: frames to keep per film, spread evenly; None keeps all.
  """

  seed: int = 0
  caption_last: float = 0.0
  caption_dropout: float = 0.0
  max_frames: int | None = None


class FilmCodes(NamedTuple):
  """The codes of one clip: blocks [N, P] of consecutive frames, `num_frames` in all."""

  num_frames: int
  blocks: Iterable[np.ndarray]


class FilmDocuments:
  """Makes documents of films with their captions, dialogues, or texts between them."""

  def __init__(self, tokenizer: Tokenizer, layout: VisionLayout, settings: RowSettings):
    """
    Args:
      tokenizer: encodes the text, and has the template of dialogues.
      layout: of the VQGAN that the codes come from.
      settings: order, captions and frames.
    """
    self._tokenizer = tokenizer
    self._layout = layout
    self._settings = settings
    self._chat = ChatFormat(tokenizer)

  @property
  def codes_per_frame(self) -> int:
    return self._layout.codes_per_frame

  def template(self, film: Film) -> Document:
    """The document of a film, with one frame in place of the frames of each clip.

    Raises:
      BadDocument: the texts cannot become a document.
    """
    frame_1xP = np.zeros((1, self._layout.codes_per_frame), np.int32)
    builder = DocumentBuilder(self._tokenizer, self._layout)
    if film.turns is not None:
      return self._chat.document(film.turns, builder.vision(frame_1xP, loss=False).build().tokens)
    if film.content:
      builder.bos()
      for item in film.content:
        if isinstance(item, str):
          builder.text(item)
        else:
          builder.vision(frame_1xP)
      return builder.eos().build()
    caption, is_last = self._caption(film)
    return video_document(self._tokenizer, frame_1xP, caption, self._layout, is_last)

  def _caption(self, film: Film) -> tuple[str, bool]:
    """The caption of a film, empty without one, and whether it follows the frames."""
    settings = self._settings
    if not film.captions:
      return "", False
    place = f"{film.key}:{film.start}"
    caption = choose(film.captions, settings.seed, place)
    if happens(settings.caption_last, settings.seed, f"{place}:order:{caption}"):
      return caption, True
    is_dropped = happens(settings.caption_dropout, settings.seed, f"{place}:dropout:{caption}")
    return "" if is_dropped else caption, False

  def pieces(self, template: Document, clips_C: Sequence[FilmCodes]) -> Iterator[Document]:
    """The pieces of a document.

    Args:
      template: as `template` returns it.
      clips_C: codes, in the order of the document.
    """
    tokens, loss_mask = template
    # The template has exactly one frame per clip.
    is_vision = tokens >= self._tokenizer.vocab_size
    starts_C = np.flatnonzero(is_vision)[:: self._layout.tokens_per_frame].tolist()
    rest = 0
    for start, clip in zip(starts_C, clips_C, strict=True):
      yield Document(tokens[rest:start], loss_mask[rest:start])
      for frames in self._frames(clip):
        yield Document(self._tokenizer.vocab_size + frames, np.full(len(frames), loss_mask[start]))
      rest = start + self._layout.tokens_per_frame
    yield Document(tokens[rest:], loss_mask[rest:])

  def _frames(self, clip: FilmCodes) -> Iterator[np.ndarray]:
    """The frames of a clip that are kept, as vision ids."""
    kept_N = evenly_spaced(clip.num_frames, self._settings.max_frames)
    first = 0
    for codes_NxP in clip.blocks:
      stop = first + len(codes_NxP)
      in_block = kept_N[(first <= kept_N) & (kept_N < stop)]
      if len(in_block):
        frames = frame_tokens(codes_NxP[in_block - first], self._layout)
        if in_block[-1] != kept_N[-1]:
          frames[-1] = self._layout.end_of_frame
        yield frames
      first = stop
