"""Chat records as documents: the tokenizer's chat template, with loss on the assistant's turns.

L tokens of a document.

A document is the template's rendering of the whole conversation, tokenised in one piece, as
`apply_chat_template` of Hugging Face's transformers does. Noncharacters around each message's
content, taken out after the rendering, say which characters are whose:

  - Marks such as <|im_start|> are marks where the template writes them. The same characters in a
    message are text; the part of a message that holds them is tokenised by itself.
  - The assistant's contents count in the loss, each with the mark that follows it. A template with
    {% generation %} blocks decides this itself: only what these blocks write counts.
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
from lwm.data.tokenizer import TextError, Tokenizer, mark_pattern, read_settings, token_name
from lwm.errors import UserError

# The form of LWM's chats, for tokenizers without a template.
DEFAULT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{{ message.content }} {% elif message.role == 'user' %}
USER: {{ message.content }} {% elif message.role == 'assistant' %}
ASSISTANT: {{ message.content }}{{ eos_token }}{% else %}
{{ raise_exception('role ' ~ message.role ~ ' is not system, user or assistant') }}{% endif %}
{% endfor %}
"""
# Each pair opens and closes a range of characters: of a message, or of what counts in the loss.
_MARKERS = _MESSAGE, _MESSAGE_END, _ANSWER, _ANSWER_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKER = re.compile(f"[{''.join(_MARKERS)}]")
# What an assistant's message may say outside its content; a template may write it anywhere.
_OUTSIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

Range = tuple[int, int]


class ChatFormat:
  """The chat template of a tokenizer.

  It comes from chat_template.jinja or tokenizer_config.json beside the tokenizer's file, or is
  DEFAULT_TEMPLATE. Templates see no date, so that the same records make the same documents.
  """

  def __init__(self, tokenizer: Tokenizer):
    """Raises UserError if the template cannot be read."""
    self._tokenizer = tokenizer
    settings = read_settings(tokenizer.path)
    source, where = _template_source(tokenizer.path, settings)
    self._says_what_counts = re.search(r"\{%-?\s*generation\b", source) is not None
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateError as error:
      raise UserError(f"The chat template in {where} cannot be used: {error}.") from error
    names = {index: name for name, index in tokenizer.marks.items()}
    tokens = {"bos_token": names.get(tokenizer.bos_id), "eos_token": names.get(tokenizer.eos_id)}
    tokens |= {name: token_name(settings[name]) for name in settings if name.endswith("_token")}
    self._variables = {name: token for name, token in tokens.items() if isinstance(token, str)}

  def document(self, messages: Any) -> Document:
    """The document of a conversation.

    Args:
      messages: a list of {"role": ..., "content": text, ...}.

    Raises:
      BadDocument: it is not such a list, or the template refuses it or changes what was said.
    """
    messages = _checked(messages)
    if not self._says_what_counts:
      _check_nothing_outside_content(messages)
    text, said, answers = self._render(messages)
    written, apart = [], set()
    for mark in mark_pattern(self._tokenizer.marks).finditer(text):
      inside = [(start, end) for start, end in said if mark.start() < end and start < mark.end()]
      apart.update(inside)
      if not inside:
        written.append(mark)
    if not self._says_what_counts:
      ends = {mark.start(): mark.end() for mark in written}
      answers = [(start, ends.get(_skip_space(text, end), end)) for start, end in answers]
    try:
      spans_Lx3 = np.array(self._encode(text, sorted(apart)), np.int64).reshape(-1, 3)
    except TextError as error:
      raise BadDocument(str(error)) from error
    ids, first, stop = spans_Lx3.T
    # A character of several tokens may belong to one of them alone, and the others to none.
    stop = np.maximum(stop, first + 1)
    loss_mask = np.zeros(len(ids), bool)
    for start, end in answers:
      loss_mask |= (first < end) & (start < stop)
    return Document(ids.astype(np.int32), loss_mask)

  def _render(self, messages: list[dict[str, Any]]) -> tuple[str, list[Range], list[Range]]:
    """The conversation as text, and its ranges of messages and of answers."""
    try:
      text = _MARKER.sub("", self._template.render(messages=messages, **self._variables))
      # A template that strips the content must find its outer spaces outside the markers.
      for strip in (False, True):
        marked_messages = [self._with_markers(message, strip) for message in messages]
        marked = self._template.render(messages=marked_messages, **self._variables)
        if _MARKER.sub("", marked) == text:
          break
    except Exception as error:  # A template can raise anything.
      raise BadDocument(f"the chat template refuses the messages: {error}") from error
    places: dict[str, list[int]] = {marker: [] for marker in _MARKERS}
    for number, match in enumerate(_MARKER.finditer(marked)):
      places[match[0]].append(match.start() - number)
    said = list(zip(places[_MESSAGE], places[_MESSAGE_END]))
    answers = list(zip(places[_ANSWER], places[_ANSWER_END]))
    if (
      text != _MARKER.sub("", marked)
      or not len(said) == len(places[_MESSAGE]) == len(places[_MESSAGE_END])
      or not len(answers) == len(places[_ANSWER]) == len(places[_ANSWER_END])
      or any(end < start for start, end in said + answers)
      or len(said) < sum(bool(message["content"].strip()) for message in messages)
    ):
      raise BadDocument("the chat template leaves out or changes what a message says")
    return text, said, answers

  def _with_markers(self, message: dict[str, Any], strip: bool) -> dict[str, Any]:
    """The message with markers around its content; `strip` leaves its outer spaces outside them."""
    content = message["content"]
    core = content.strip() if strip else content
    if not core.strip():
      return message
    start = content.index(core)
    marked = _MESSAGE + core + _MESSAGE_END
    if message["role"] == "assistant" and not self._says_what_counts:
      marked = _ANSWER + marked + _ANSWER_END
    return {**message, "content": content[:start] + marked + content[start + len(core) :]}

  def _encode(self, text: str, apart: list[Range]) -> list[tuple[int, int, int]]:
    """Ids and their ranges of characters; the ranges `apart` are encoded by themselves, as text."""
    spans: list[tuple[int, int, int]] = []
    borders = [0, *(border for piece in apart for border in piece), len(text)]
    for number, (start, end) in enumerate(zip(borders, borders[1:])):
      pieces = self._tokenizer.encode_spans(text[start:end], with_marks=number % 2 == 0)
      spans += [(index, start + first, start + stop) for index, first, stop in pieces]
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


def _template_source(path: pathlib.Path, settings: dict[str, Any]) -> tuple[str, str]:
  """The template, and what to call the place it comes from."""
  file = path.with_name("chat_template.jinja")
  if file.exists():
    return file.read_text("utf-8-sig"), str(file)
  template = settings.get("chat_template")
  if isinstance(template, list):  # Templates by name.
    template = {entry["name"]: entry["template"] for entry in template}.get("default")
  return template or DEFAULT_TEMPLATE, str(path.with_name("tokenizer_config.json"))


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
  """As transformers has it: Jinja's own filter would escape HTML."""
  return json.dumps(value, ensure_ascii=False, indent=indent)


def _checked(messages: Any) -> list[dict[str, Any]]:
  """The messages, with content that is text in every one. Raises BadDocument."""
  if isinstance(messages, dict) and all(isinstance(value, list) for value in messages.values()):
    # TFDS keeps a sequence of dictionaries as a dictionary of sequences.
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
  """Raises BadDocument for what an assistant says that would get no loss."""
  for number, message in enumerate(messages, start=1):
    for name in _OUTSIDE_CONTENT:
      if message["role"] == "assistant" and message.get(name):
        raise BadDocument(
          f"message {number} has {name}, which only a chat template with {{% generation %}} "
          "blocks can train on"
        )


def _skip_space(text: str, start: int) -> int:
  match = re.compile(r"\s*").match(text, start)
  assert match is not None
  return match.end()
