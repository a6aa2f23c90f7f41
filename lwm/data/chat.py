"""Chat records as documents: the tokenizer's chat template, with loss on the assistant's turns.

L tokens of a document.

A document is the template's rendering of the whole conversation, tokenised in one piece as
`apply_chat_template` of Hugging Face's transformers does, with two differences:

  - Marks such as <|im_start|> are marks only where the template writes them. In a message the same
    characters are text. A message that contains them is tokenised apart from the text around it.
  - The loss counts the assistant's messages, each with the mark that follows it. A template with
    {% generation %} blocks decides this itself: the loss counts what these blocks write.

To find the messages in the rendering, noncharacters are put around them first and removed after.
"""

import json
import pathlib
import re
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from lwm.data.documents import BadDocument, Document, as_text
from lwm.data.tokenizer import (
  CHAT_TEMPLATE,
  TextError,
  Tokenizer,
  mark_pattern,
  read_settings,
  token_name,
)
from lwm.data.vision_tokens import VISION_START
from lwm.errors import UserError

# LWM's form of a chat, for tokenizers without a template.
DEFAULT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{{ message.content }} {% elif message.role == 'user' %}
USER: {{ message.content }} {% elif message.role == 'assistant' %}
ASSISTANT: {{ message.content }}{{ eos_token }}{% else %}
{{ raise_exception('role ' ~ message.role ~ ' is not system, user or assistant') }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
ASSISTANT:{% endif %}
"""
# Each pair encloses characters: those of a message, or those that count in the loss.
_MARKERS = _MESSAGE, _MESSAGE_END, _ANSWER, _ANSWER_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKER = re.compile(f"[{''.join(_MARKERS)}]")
# Fields of an assistant's message that a template may write outside its content.
_OUTSIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

Range = tuple[int, int]


class ChatFormat:
  """The chat template of a tokenizer.

  It is in chat_template.jinja or tokenizer_config.json beside the tokenizer's file; without them it
  is DEFAULT_TEMPLATE. Templates get no date, so the same records always make the same documents.
  """

  def __init__(self, tokenizer: Tokenizer):
    """Raises UserError if the template cannot be used."""
    self._tokenizer = tokenizer
    settings = read_settings(tokenizer.path)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
      source = template_of(tokenizer.path, settings) or DEFAULT_TEMPLATE
      self._template = environment.from_string(source)
    except Exception as error:  # The settings can hold anything.
      raise UserError(
        f"The chat template beside {tokenizer.path} cannot be used: {error}."
      ) from error
    self._has_generation = re.search(r"\{%-?\s*generation\b", source) is not None
    names = {index: name for name, index in tokenizer.marks.items()}
    tokens = {"bos_token": names.get(tokenizer.bos_id), "eos_token": names.get(tokenizer.eos_id)}
    tokens |= {name: token_name(settings[name]) for name in settings if name.endswith("_token")}
    self._variables = {name: token for name, token in tokens.items() if isinstance(token, str)}

  def prompt(self, messages: Any, film: np.ndarray | None = None) -> list[int]:
    """The ids of a conversation, up to where the assistant's answer begins.

    Args:
      messages: as for `document`.
      film: likewise.

    Raises:
      BadDocument: as `document` does.
    """
    messages = _checked(messages)
    if film is not None:
      messages = _with_film_mark(messages)
    text, contents, _ = self._render(messages, add_generation_prompt=True)
    marks = mark_pattern(self._tokenizer.marks)
    plain = [content for content in contents if marks.search(text[slice(*content)])]
    return [index for index, _, _ in self._encode_with_film(text, contents, plain, film)]

  def document(self, messages: Any, film: np.ndarray | None = None) -> Document:
    """The document of a conversation.

    Args:
      messages: a list of {"role": ..., "content": text, ...}.
      film: int32 ids to put, without loss, where a message says <vision>; if none does, the first
        user's message begins with <vision> and a line break.

    Raises:
      BadDocument: it is not such a list, or the template refuses it or changes a message.
    """
    messages = _checked(messages)
    if film is not None:
      messages = _with_film_mark(messages)
    if not self._has_generation:
      _check_nothing_outside_content(messages)
    text, contents, answers = self._render(messages)
    mark_ends = {}
    contents_with_marks = set()
    for mark in mark_pattern(self._tokenizer.marks).finditer(text):
      inside = [content for content in contents if _overlap(mark.span(), content)]
      contents_with_marks.update(inside)
      if not inside:
        mark_ends[mark.start()] = mark.end()
    if not self._has_generation:
      answers = [(start, mark_ends.get(_skip_space(text, stop), stop)) for start, stop in answers]
    plain = sorted(contents_with_marks)
    try:
      spans = self._encode_with_film(text, contents, plain, film)
    except TextError as error:
      raise BadDocument(str(error)) from error
    spans_Lx3 = np.array(spans, np.int64).reshape(-1, 3)
    ids_L, starts_L, stops_L = spans_Lx3.T
    # If several tokens spell one character, some of them have an empty range.
    stops_L = np.maximum(stops_L, starts_L + 1)
    loss_mask_L = np.zeros(len(ids_L), bool)
    for start, stop in answers:
      loss_mask_L |= (starts_L < stop) & (start < stops_L)
    return Document(ids_L.astype(np.int32), loss_mask_L)

  def _render(
    self, messages: list[dict[str, Any]], add_generation_prompt: bool = False
  ) -> tuple[str, list[Range], list[Range]]:
    """The conversation as text, and the ranges in it of the contents and of the answers."""
    variables = self._variables | {"add_generation_prompt": add_generation_prompt}
    try:
      text = _MARKER.sub("", self._template.render(messages=messages, **variables))
      # A template that strips a content does so only if its outer spaces are outside the markers.
      for strip in (False, True):
        marked_messages = [self._with_markers(message, strip) for message in messages]
        marked = self._template.render(messages=marked_messages, **variables)
        if _MARKER.sub("", marked) == text:
          break
    except Exception as error:  # A template can raise anything.
      raise BadDocument(f"the chat template refuses the messages: {error}") from error
    places: dict[str, list[int]] = {marker: [] for marker in _MARKERS}
    for number, match in enumerate(_MARKER.finditer(marked)):
      places[match[0]].append(match.start() - number)
    contents = list(zip(places[_MESSAGE], places[_MESSAGE_END]))
    answers = list(zip(places[_ANSWER], places[_ANSWER_END]))
    if (
      text != _MARKER.sub("", marked)
      or not len(contents) == len(places[_MESSAGE]) == len(places[_MESSAGE_END])
      or not len(answers) == len(places[_ANSWER]) == len(places[_ANSWER_END])
      or any(stop < start for start, stop in contents + answers)
      or len(contents) < sum(bool(message["content"].strip()) for message in messages)
    ):
      raise BadDocument("the chat template leaves out or changes what a message says")
    return text, contents, answers

  def _with_markers(self, message: dict[str, Any], strip: bool) -> dict[str, Any]:
    """The message with markers around its content; `strip` leaves its outer spaces outside them."""
    content = message["content"]
    core = content.strip() if strip else content
    if not core.strip():
      return message
    start = content.index(core)
    marked = _MESSAGE + core + _MESSAGE_END
    if message["role"] == "assistant" and not self._has_generation:
      marked = _ANSWER + marked + _ANSWER_END
    return {**message, "content": content[:start] + marked + content[start + len(core) :]}

  def _encode_with_film(
    self, text: str, contents: list[Range], plain: list[Range], film: np.ndarray | None
  ) -> list[tuple[int, int, int]]:
    """`_encode`, with the ids of the film in the place of the first <vision> in a content."""
    if film is None:
      return self._encode(text, plain)
    place = next(
      start + text[start:stop].index(VISION_START)
      for start, stop in contents
      if VISION_START in text[start:stop]
    )
    rest = place + len(VISION_START)
    after = self._encode(text[rest:], _clipped(plain, rest, len(text)))
    return [
      *self._encode(text[:place], _clipped(plain, 0, place)),
      *((index, place, place) for index in film.tolist()),
      *((index, rest + start, rest + stop) for index, start, stop in after),
    ]

  def _encode(self, text: str, plain: list[Range]) -> list[tuple[int, int, int]]:
    """Ids with their ranges of characters. The ranges `plain` are encoded apart, without marks."""
    spans: list[tuple[int, int, int]] = []
    borders = [0, *(border for piece in plain for border in piece), len(text)]
    for number, (first, last) in enumerate(zip(borders, borders[1:])):
      pieces = self._tokenizer.encode_spans(text[first:last], with_marks=number % 2 == 0)
      spans += [(index, first + start, first + stop) for index, start, stop in pieces]
    return spans


class _Generation(jinja2.ext.Extension):
  """{% generation %}...{% endgeneration %}: what the block writes counts in the loss."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

  def _mark(self, caller: jinja2.runtime.Macro) -> str:
    return _ANSWER + caller() + _ANSWER_END


def template_of(path: pathlib.Path, settings: dict[str, Any]) -> str | None:
  """The chat template of the tokenizer at `path`, in a file of its own or in its settings."""
  file = path.with_name(CHAT_TEMPLATE)
  if file.exists():
    return file.read_text("utf-8-sig")
  template = settings.get("chat_template")
  if isinstance(template, list):  # Templates by name.
    template = {entry["name"]: entry["template"] for entry in template}.get("default")
  return template


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
  """The `tojson` of transformers; Jinja's own escapes HTML."""
  return json.dumps(value, ensure_ascii=False, indent=indent)


def _checked(messages: Any) -> list[dict[str, Any]]:
  """The messages, with role and content as text. Raises BadDocument for anything else."""
  if isinstance(messages, dict) and all(isinstance(value, list) for value in messages.values()):
    # TFDS keeps a sequence of dictionaries as a dictionary of sequences.
    lengths = {name: len(values) for name, values in messages.items()}
    if len(set(lengths.values())) > 1:
      counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
      raise BadDocument(f"the lists of the messages differ in length: {counts}")
    messages = [dict(zip(messages, row)) for row in zip(*messages.values())]
  if not isinstance(messages, list):
    raise BadDocument(f"the messages are {type(messages).__name__}, not a list")
  checked = []
  for number, message in enumerate(messages, start=1):
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
      has = ", ".join(message) if isinstance(message, dict) else type(message).__name__
      raise BadDocument(f"message {number} has no role and content, only {has}")
    role, content = (
      as_text(message[name], f"the {name} of message {number}") for name in ("role", "content")
    )
    if not re.fullmatch(r"\w+", role):
      raise BadDocument(f"the role of message {number} is {role!r}, not a word")
    if _MARKER.search(content):
      raise BadDocument(f"message {number} holds a noncharacter of U+FDD0 to U+FDD3")
    checked.append({**message, "role": role, "content": content})
  return checked


def _check_nothing_outside_content(messages: list[dict[str, Any]]) -> None:
  """Raises BadDocument if an assistant says something that would not count in the loss."""
  for number, message in enumerate(messages, start=1):
    for name in _OUTSIDE_CONTENT:
      if message["role"] == "assistant" and message.get(name):
        raise BadDocument(
          f"message {number} has {name}, which only a chat template with {{% generation %}} "
          "blocks can train on"
        )


def _with_film_mark(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The messages, of which one says <vision>. Raises BadDocument if there is no place for it."""
  places = sum(message["content"].count(VISION_START) for message in messages)
  if places > 1:
    raise BadDocument(f"the messages say {VISION_START} {places} times, and there is one film")
  if places:
    return messages
  for number, message in enumerate(messages):
    if message["role"] == "user":
      marked = {**message, "content": f"{VISION_START}\n{message['content']}"}
      return [*messages[:number], marked, *messages[number + 1 :]]
  raise BadDocument("no message is the user's, so there is no place for the film")


def _clipped(ranges: list[Range], first: int, last: int) -> list[Range]:
  """The parts of the ranges inside [first, last), counted from `first`."""
  clipped = [(max(start, first) - first, min(stop, last) - first) for start, stop in ranges]
  return [(start, stop) for start, stop in clipped if start < stop]


def _overlap(one: Range, other: Range) -> bool:
  return one[0] < other[1] and other[0] < one[1]


def _skip_space(text: str, start: int) -> int:
  match = re.compile(r"\s*").match(text, start)
  assert match is not None
  return match.end()
