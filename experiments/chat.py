"""Chats with a model about films and images.

    python -m experiments.chat --workdir=runs/laptop --film=holiday.mp4
    python -m experiments.chat --workdir=runs/laptop --film=holiday.mp4 \\
        --question="Who comes in?" --question="And after that?" --save_prefix=holiday.prefix
    python -m experiments.chat --workdir=runs/laptop --load_prefix=holiday.prefix

Frames are taken from the film and tokenised on all devices. The model reads them once; each
question is read after them and after the questions and answers before it. Without --question,
questions are lines of the standard input. --save_prefix stores the keys and values that the model
has computed for the film, so that a later process need not compute them again. --mesh.ring=8
divides film, cache and weights over eight devices (docs/generate.md).
"""

import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags

from experiments import flags as experiment_flags, inference
from lwm import infer
from lwm.data.chat import ChatFormat
from lwm.data.documents import BadDocument
from lwm.errors import UserError
from lwm.infer.films import check_films, vision_ids
from lwm.infer.grammar import picture_marks
from lwm.infer.prefix import SavedPrefix, save_prefix

_FLAGS = inference.Flags()
flags.adopt_module_key_flags(inference)
_FILM = flags.DEFINE_multi_string("film", [], "A film; may be repeated.")
_IMAGE = flags.DEFINE_multi_string("image", [], "An image; may be repeated.")
_QUESTION = flags.DEFINE_multi_string(
  "question", [], "A question; may be repeated. Default: lines of the standard input."
)
_SYSTEM = flags.DEFINE_string("system", None, "The system message.")
_CONTEXT = flags.DEFINE_integer(
  "context",
  None,
  "Maximum number of tokens in the conversation. Default: those of the films plus 4096, or more if "
  "the questions and the longest answers need more.",
  lower_bound=1,
)
_SAVE_PREFIX = flags.DEFINE_string(
  "save_prefix", None, "Directory to make, for the cached keys and values of the films."
)
_LOAD_PREFIX = flags.DEFINE_string(
  "load_prefix", None, "Directory that --save_prefix made; it takes the place of the films."
)

_ROOM_FOR_TALK = 4096
_PROMPT_SIGN = "> "


def questions() -> Iterator[str]:
  if _QUESTION.value:
    for question in _QUESTION.value:
      print(f"{_PROMPT_SIGN}{question}", flush=True)
      yield question
    return
  while True:
    print(_PROMPT_SIGN, end="", flush=True)
    line = sys.stdin.readline()
    if not line:
      print()
      return
    if line.strip():
      yield line.strip()


class Conversation:
  """The messages so far, as ids; the films are part of the first question."""

  def __init__(self, checkpoint: inference.Checkpoint, vision: np.ndarray | None):
    self._chat, self._vision = ChatFormat(checkpoint.tokenizer), vision
    self._messages = [{"role": "system", "content": _SYSTEM.value}] if _SYSTEM.value else []

  def ask(self, question: str) -> list[int]:
    """The ids up to where the answer begins. Raises UserError for what the template refuses."""
    self._messages.append({"role": "user", "content": question})
    try:
      return self._chat.prompt(self._messages, self._vision)
    except BadDocument as error:
      raise UserError(f"The question {question!r} cannot be asked: {error}.") from error

  def answered(self, text: str) -> None:
    self._messages.append({"role": "assistant", "content": text.strip()})


def prefix_of(checkpoint: inference.Checkpoint, vision: np.ndarray | None) -> list[int]:
  """The ids up to the end of the films, with which all conversations about them begin."""
  prompt = Conversation(checkpoint, vision).ask("?")
  last = [index for index, token in enumerate(prompt) if token >= checkpoint.text_vocab_size]
  return prompt[: last[-1] + 1] if last else []


def vision_of(checkpoint: inference.Checkpoint, prefix: list[int]) -> np.ndarray:
  """The ids of the films in a prefix, with the marks around them."""
  start, end = picture_marks(checkpoint.tokenizer)
  first = next(i for i, token in enumerate(prefix) if token >= checkpoint.text_vocab_size)
  return np.array([*prefix[first - len(start) :], *end], np.int32)


def longest_talk(checkpoint: inference.Checkpoint, vision: np.ndarray | None) -> int:
  """Tokens of the films, every --question, and an answer of --num_tokens to each."""
  conversation = Conversation(checkpoint, vision)
  tokens = prefix_of(checkpoint, vision)
  for question in _QUESTION.value:
    tokens = conversation.ask(question)
    conversation.answered("")
  return len(tokens) + _FLAGS.num_tokens * max(len(_QUESTION.value), 1)


def capacity_for(checkpoint: inference.Checkpoint, vision: np.ndarray | None) -> int:
  """The value of --context, or its default. Raises UserError unless the conversation fits."""
  needed = longest_talk(checkpoint, vision)
  capacity = _CONTEXT.value or max(needed, len(prefix_of(checkpoint, vision)) + _ROOM_FOR_TALK)
  if needed > capacity:
    raise UserError(
      f"The films and questions with answers of {_FLAGS.num_tokens:,} tokens may take {needed:,} "
      f"tokens, more than --context={capacity:,}: raise it, or take fewer --frames_per_second or "
      "--num_tokens."
    )
  checkpoint.check_cache(1, capacity)
  return capacity


def one_frame_each(checkpoint: inference.Checkpoint, count: int) -> np.ndarray | None:
  """Ids of films with one frame each, for a check before the real lengths are known."""
  if not count:
    return None
  layout = checkpoint.codec().config.layout
  frame_1xP = np.zeros((1, layout.codes_per_frame), np.int32)
  return vision_ids(checkpoint.tokenizer, checkpoint.text_vocab_size, layout, [frame_1xP] * count)


def check_room(tokens: list[int], capacity: int) -> None:
  """Raises UserError unless these tokens and an answer fit."""
  if len(tokens) + _FLAGS.num_tokens > capacity:
    raise UserError(
      f"The conversation has {len(tokens):,} tokens and an answer up to "
      f"{_FLAGS.num_tokens:,}, more than --context={capacity:,}: raise it, or take fewer "
      "--frames_per_second or --num_tokens."
    )


def open_session(
  checkpoint: inference.Checkpoint, vision: np.ndarray | None, saved: SavedPrefix | None
) -> infer.Session:
  """A session that has read the films, or a saved prefix with them."""
  prefix = prefix_of(checkpoint, vision)
  if saved and saved.tokens != prefix:
    raise UserError(
      f"--load_prefix={_LOAD_PREFIX.value} was made with another --system: give the same message."
    )
  capacity = capacity_for(checkpoint, vision)
  engine = checkpoint.engine(checkpoint.load())
  print(f"cache: {engine.cache_bytes(1, capacity) / 2**20:,.1f} MiB for {capacity:,} tokens")
  if saved:
    return saved.open(engine, capacity)
  return engine.open([prefix], capacity) if prefix else engine.start(capacity)


def main(argv: list[str]) -> None:
  del argv
  paths = [*_FILM.value, *_IMAGE.value]
  if _LOAD_PREFIX.value and paths:
    raise UserError("--load_prefix has a film already: leave out --film and --image.")
  if _SAVE_PREFIX.value and not paths:
    raise UserError("--save_prefix keeps a film: give --film or --image too.")
  if _SAVE_PREFIX.value and pathlib.Path(_SAVE_PREFIX.value).exists():
    raise UserError(f"--save_prefix={_SAVE_PREFIX.value} exists: name another directory.")
  check_films(paths)
  checkpoint = inference.Checkpoint(_FLAGS)
  started = time.perf_counter()
  saved = None
  if _LOAD_PREFIX.value:
    path = pathlib.Path(_LOAD_PREFIX.value)
    saved = SavedPrefix(path, checkpoint.stored.identity, _FLAGS.cache)
    vision: np.ndarray | None = vision_of(checkpoint, saved.tokens)
  else:
    capacity_for(checkpoint, one_frame_each(checkpoint, len(paths)))
    vision = checkpoint.films(paths, _CONTEXT.value)
    if vision is not None:
      print(f"films: {len(vision):,} tokens in {time.perf_counter() - started:.1f} s")
  started = time.perf_counter()
  session = open_session(checkpoint, vision, saved)
  jax.block_until_ready(session.state)
  print(f"read: {len(session.tokens[0]):,} tokens in {time.perf_counter() - started:.1f} s")
  if _SAVE_PREFIX.value:
    save_prefix(session, pathlib.Path(_SAVE_PREFIX.value), checkpoint.stored.identity)
  conversation = Conversation(checkpoint, vision)
  sampling = checkpoint.text_sampling()
  for question in questions():
    started = time.perf_counter()
    prompt = conversation.ask(question)
    check_room(prompt, session.capacity)
    session.follow([prompt])
    conversation.answered(inference.stream(checkpoint, session, sampling, started))


if __name__ == "__main__":
  experiment_flags.run(main)
