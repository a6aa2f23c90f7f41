"""Documents of films, in pieces: a film of any length never is in memory as a whole.

N frames, P codes per frame.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from lwm.config.vqgan import VisionLayout
from lwm.data.chat import ChatFormat
from lwm.data.documents import Document, DocumentBuilder, choose, video_document
from lwm.data.films import Film
from lwm.data.tokenizer import Tokenizer
from lwm.data.vision_tokens import frame_tokens


class FilmDocuments:
  """Makes documents of films with their captions or dialogues."""

  def __init__(self, tokenizer: Tokenizer, layout: VisionLayout, seed: int):
    """
    Args:
      tokenizer: encodes the text, and has the template of dialogues.
      layout: of the VQGAN that the codes come from.
      seed: decides which caption a film takes.
    """
    self._tokenizer = tokenizer
    self._layout = layout
    self._seed = seed
    self._chat = ChatFormat(tokenizer)

  @property
  def codes_per_frame(self) -> int:
    return self._layout.codes_per_frame

  def template(self, film: Film) -> Document:
    """The document of a film, with one frame in place of its frames.

    Raises:
      BadDocument: the dialogue cannot become a document.
    """
    frame_1xP = np.zeros((1, self._layout.codes_per_frame), np.int32)
    if film.turns is not None:
      vision = DocumentBuilder(self._tokenizer, self._layout).vision(frame_1xP, loss=False).build()
      return self._chat.document(film.turns, vision.tokens)
    place = f"{film.key}:{film.start}"
    caption = choose(film.captions, self._seed, place) if film.captions else ""
    return video_document(self._tokenizer, frame_1xP, caption, self._layout)

  def pieces(
    self, template: Document, num_frames: int, blocks: Iterable[np.ndarray]
  ) -> Iterator[Document]:
    """The pieces of a document.

    Args:
      template: as `template` returns it.
      num_frames: in all blocks.
      blocks: the film's codes [N, P].
    """
    tokens, loss_mask = template
    start = int(np.argmax(tokens >= self._tokenizer.vocab_size))
    stop = start + self._layout.tokens_per_frame
    yield Document(tokens[:start], loss_mask[:start])
    for codes_NxP in blocks:
      frames = frame_tokens(codes_NxP, self._layout)
      num_frames -= len(codes_NxP)
      if num_frames:
        frames[-1] = self._layout.end_of_frame
      yield Document(self._tokenizer.vocab_size + frames, np.full(len(frames), loss_mask[start]))
    yield Document(tokens[stop:], loss_mask[stop:])
