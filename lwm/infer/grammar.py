"""Which ids may come next: text, the codes of frames, or a mark that the grammar forces.

A row is text, with pictures in it: <vision>, frames, </vision>. A frame is a fixed number of codes
and one end mark: <eof>, or <eov> after the last frame (lwm/data/vision_tokens.py).

B rows, V vocabulary, P codes per frame, R ids of <vision>.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from lwm.config.vqgan import VisionLayout
from lwm.data.tokenizer import Tokenizer
from lwm.data.vision_tokens import VISION_END, VISION_START
from lwm.infer.sampling import Choice, draw


@dataclasses.dataclass(frozen=True)
class Pictures:
  """The ids of frames and of the marks around them, in the model's id space.

  Attributes:
    first: id of code 0.
    codebook_size: codes that may be drawn.
    layout: of frames.
    start: ids of <vision>: one mark, or a text that spells it.
    end: ids of </vision>, likewise.
    frames: frames of a picture or film; after the last one comes <eov>. None: the model chooses
      between <eof> and <eov> after each frame.
    are_opened: whether a picture begins where the text says <vision>.
    then_text: whether text follows a picture; if not, a row ends with <eov>.
  """

  first: int
  codebook_size: int
  layout: VisionLayout
  start: tuple[int, ...]
  end: tuple[int, ...]
  frames: int | None = None
  are_opened: bool = False
  then_text: bool = False

  @classmethod
  def of(
    cls, tokenizer: Tokenizer, text_vocab_size: int, codebook_size: int, layout: VisionLayout
  ) -> Self:
    """The pictures of a model with this tokenizer and number of text ids."""
    return cls(text_vocab_size, codebook_size, layout, *picture_marks(tokenizer))

  @property
  def end_of_frame(self) -> int:
    return self.first + self.layout.end_of_frame

  @property
  def end_of_vision(self) -> int:
    return self.first + self.layout.end_of_vision


def picture_marks(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The ids of <vision> and of </vision>: one mark, or a text that spells it."""

  def mark(name: str) -> tuple[int, ...]:
    index = tokenizer.marks.get(name)
    return tuple(tokenizer.encode(name)) if index is None else (index,)

  return mark(VISION_START), mark(VISION_END)


class Place(NamedTuple):
  """Where each row is in the grammar; int32.

  Attributes:
    code_B: codes of the current frame so far; -1 in text.
    frame_B: complete frames of the current picture, not counting those of the prompt.
    closing_B: how many ids of </vision> are done; all of them if the row is not closing a picture.
    recent_BxR: the last R ids.
  """

  code_B: jax.Array
  frame_B: jax.Array
  closing_B: jax.Array
  recent_BxR: jax.Array


@dataclasses.dataclass(frozen=True)
class Grammar:
  """Draws the next id of each row.

  Attributes:
    text_size: text ids that may be drawn.
    stop_ids: text ids that end a row.
    text: how text is drawn.
    pictures: None for text only.
    vision: how codes are drawn.
  """

  text_size: int
  stop_ids: tuple[int, ...] = ()
  text: Choice = Choice()
  pictures: Pictures | None = None
  vision: Choice = Choice()

  @property
  def has_penalty(self) -> bool:
    """Whether draws depend on the ids that a row has."""
    return any(choice.repetition_penalty != 1 for choice in (self.text, self.vision))

  def place_after(self, rows: Sequence[Sequence[int]]) -> Place:
    """Where rows are after these ids."""
    pictures = self.pictures
    if pictures is None:
      # Separate arrays, because `programs.generate` donates their buffers.
      code_B, frame_B, closing_B = (jnp.full(len(rows), n, jnp.int32) for n in (-1, 0, 0))
      return Place(code_B, frame_B, closing_B, jnp.zeros((len(rows), 0), jnp.int32))
    R, code, closing, recent = len(pictures.start), [], [], []
    for row in rows:
      own_code, own_closing = -1, len(pictures.end)
      recent.append([*[-1] * R, *map(int, row)][-R:])
      if len(row) and row[-1] == pictures.end_of_vision:
        own_closing = 0
      elif len(row) and row[-1] >= pictures.first:
        own_code = 0
        while own_code < len(row) and (
          pictures.first <= row[-1 - own_code] < pictures.end_of_frame
        ):
          own_code += 1
      elif tuple(recent[-1]) == pictures.start:
        own_code = 0
      code.append(own_code)
      closing.append(own_closing)
    arrays = (jnp.asarray(values, jnp.int32) for values in (code, [0] * len(rows), closing, recent))
    return Place(*arrays)

  def is_vision(self, place: Place) -> jax.Array:
    """Whether the next id is a vision id, bool [B]."""
    return place.code_B >= 0

  def choose(
    self, place: Place, logits_BxV: jax.Array, key_B: jax.Array, seen_BxV: jax.Array | None
  ) -> jax.Array:
    """The next id of each row, int32 [B]."""

    def among(first: int, size: int, choice: Choice) -> jax.Array:
      ids = slice(first, first + size)
      seen_BxC = None if seen_BxV is None else seen_BxV[:, ids]
      return first + draw(logits_BxV[:, ids], key_B, choice, seen_BxC)

    token_B = among(0, self.text_size, self.text)
    pictures = self.pictures
    if pictures is None:
      return token_B
    code_B = among(pictures.first, pictures.codebook_size, self.vision)
    if pictures.frames is None:
      mark_B = among(pictures.end_of_frame, 2, self.vision)
    else:
      is_last_B = place.frame_B + 1 >= pictures.frames
      mark_B = jnp.where(is_last_B, pictures.end_of_vision, pictures.end_of_frame)
    is_whole_B = place.code_B == pictures.layout.codes_per_frame
    token_B = jnp.where(self.is_vision(place), jnp.where(is_whole_B, mark_B, code_B), token_B)
    end = jnp.asarray([*pictures.end, 0], jnp.int32)
    return jnp.where(place.closing_B < len(pictures.end), end[place.closing_B], token_B)

  def advance(self, place: Place, token_B: jax.Array) -> tuple[Place, jax.Array]:
    """The place after one more id, and whether the row has ended, bool [B]."""
    is_text_B = ~self.is_vision(place)
    is_end_B = is_text_B & jnp.isin(token_B, jnp.asarray(self.stop_ids, jnp.int32))
    pictures = self.pictures
    if pictures is None:
      return place, is_end_B
    is_closing_B = place.closing_B < len(pictures.end)
    is_end_B &= ~is_closing_B
    recent_BxR = jnp.concatenate([place.recent_BxR[:, 1:], token_B[:, None]], axis=1)
    is_eov_B = token_B == pictures.end_of_vision
    is_mark_B = is_eov_B | (token_B == pictures.end_of_frame)
    code_B = jnp.where(is_text_B, -1, jnp.where(is_mark_B, 0, place.code_B + 1))
    code_B = jnp.where(is_eov_B, -1, code_B)
    frame_B = place.frame_B + (is_mark_B & ~is_text_B)
    if pictures.are_opened:
      is_said_B = (recent_BxR == jnp.asarray(pictures.start, jnp.int32)[None]).all(axis=1)
      is_opened_B = is_text_B & ~is_closing_B & is_said_B
      code_B, frame_B = jnp.where(is_opened_B, 0, code_B), jnp.where(is_opened_B, 0, frame_B)
    closing_B = jnp.where(is_eov_B, 0, place.closing_B + is_closing_B)
    if not pictures.then_text:
      is_end_B |= is_eov_B
    return Place(code_B, frame_B, closing_B, recent_BxR), is_end_B
