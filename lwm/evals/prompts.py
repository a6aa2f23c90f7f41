"""Prompts of an exact length: a haystack with pieces put into it, and a question after it.

A prompt is made of ids. Its pieces are encoded one by one, so its length is the sum of theirs, and
nothing is ever cut from a question.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from lwm.data.chat import ChatFormat
from lwm.data.documents import BadDocument
from lwm.data.tokenizer import Tokenizer
from lwm.data.vision_tokens import VISION_START
from lwm.errors import UserError

# A piece goes to the end of a sentence at most this many tokens before its place, if there is one.
_MOST_TOKENS_BACK = 512


@dataclasses.dataclass(frozen=True)
class Frame:
  """The texts around the context of a prompt.

  Attributes:
    before: text before the context.
    after: text after it, with the question.
    answer_prefix: text with which the answer begins, as RULER gives it.
  """

  before: str
  after: str
  answer_prefix: str = ""


class PromptWriter:
  """Writes prompts with a tokenizer, plain or in its chat template."""

  def __init__(self, tokenizer: Tokenizer, chat: bool):
    """Raises UserError if the chat template cannot be used."""
    self.tokenizer = tokenizer
    self._chat = ChatFormat(tokenizer) if chat else None
    self._sentence_ends = {tokenizer.encode(f"a{mark}")[-1] for mark in ".!?"}

  def encode(self, text: str) -> list[int]:
    return self.tokenizer.encode(text)

  def write(self, frame: Frame, context: Sequence[int]) -> list[int]:
    """The prompt with this context.

    Raises:
      UserError: the chat template refuses the question.
    """
    if self._chat is None:
      ids = [self.tokenizer.bos_id, *self.encode(frame.before), *context, *self.encode(frame.after)]
    else:
      # The template takes any ids in the place of a film.
      content = f"{frame.before}{VISION_START}{frame.after}"
      try:
        ids = self._chat.prompt([{"role": "user", "content": content}], np.asarray(context, int))
      except BadDocument as error:
        raise UserError(f"The question {frame.after!r} cannot be used: {error}.") from error
    return [*ids, *(self.encode(frame.answer_prefix) if frame.answer_prefix else ())]

  def room(self, frame: Frame, tokens: int) -> int:
    """Tokens of context that fill a prompt of `tokens` tokens.

    Raises:
      UserError: no room is left.
    """
    around = len(self.write(frame, ()))
    if around >= tokens:
      raise UserError(
        f"The question takes {around:,} tokens, which leaves no room for a text in a prompt of "
        f"{tokens:,}: make --contexts longer or --num_tokens smaller."
      )
    return tokens - around

  def insert(
    self, haystack: Sequence[int], pieces: Sequence[Sequence[int]], depths: Sequence[float]
  ) -> tuple[list[int], list[int]]:
    """Puts pieces into a haystack, each at the end of the sentence before its depth.

    Args:
      haystack: ids.
      pieces: ids of each, in ascending order of depth.
      depths: in [0, 1]; 0 is before the haystack, 1 after it.

    Returns:
      The ids, and where in them each piece begins.
    """
    ids: list[int] = []
    starts, last = [], 0
    for piece, depth in zip(pieces, depths, strict=True):
      place = max(last, self._sentence_end(haystack, round(depth * len(haystack))))
      ids += haystack[last:place]
      starts.append(len(ids))
      ids += piece
      last = place
    return [*ids, *haystack[last:]], starts

  def _sentence_end(self, haystack: Sequence[int], place: int) -> int:
    if place == len(haystack):
      return place
    for end in range(place, max(place - _MOST_TOKENS_BACK, 0), -1):
      if haystack[end - 1] in self._sentence_ends:
        return end
    return place if place > _MOST_TOKENS_BACK else 0


class Haystack:
  """A text that is long enough for every prompt, as ids."""

  def __init__(self, paths: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, tokens: int):
    """Reads files, one after the other, until they have enough tokens.

    Args:
      paths: of UTF-8 texts.
      tokenizer: of the model.
      tokens: how many are needed.

    Raises:
      UserError: a file cannot be read, or all of them together are too short.
    """
    self.ids: list[int] = []
    self.paths = [pathlib.Path(path) for path in paths]
    for path in self.paths:
      if len(self.ids) >= tokens:
        break
      try:
        text = path.read_text("utf-8")
      except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--haystack={path} cannot be read as UTF-8 text: {error}.") from error
      self.ids += tokenizer.encode(text)
    if len(self.ids) < tokens:
      names = ",".join(map(str, self.paths))
      raise UserError(
        f"--haystack={names} has {len(self.ids):,} tokens, fewer than the {tokens:,} of the "
        "longest context: name more files, or make --contexts shorter."
      )


def filled(unit: Sequence[int], size: int) -> list[int]:
  """A unit repeated, and cut at exactly `size` ids."""
  return (list(unit) * (size // len(unit) + 1))[:size]
