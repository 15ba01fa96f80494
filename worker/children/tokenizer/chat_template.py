"""A base model's chat template: it renders turns as text, and finds the characters of the text that are trained on.

The environment is that of transformers, so the text is the same, with one exception. A template that asks for the date
always gets TEMPLATE_DATE, because otherwise the same file would result in other tokens on another day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from catalog.datasets.chat import Chat, only_last_trained
from catalog.datasets.chat_templates import TOOL_MODELS
from catalog.datasets.messages import ChatMessage
from catalog.errors import LorryError

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date that common templates use if there is no clock."""
NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE_USE = range(0xF0002, 0xF0100)
MAX_MESSAGE_CHARS = 200
TOOL_USE = "additional_chat_templates/tool_use.jinja"
"""The template for conversations with tools, if it is not the default one."""
CHECKS_ID_LENGTH = re.compile(r"\|\s*length\s*(?:!=|<)\s*9\b")
ID_OF_MISTRAL = re.compile(r"[A-Za-z0-9]{9}")
"""The only ids of calls that templates of Mistral accept."""


class Refused(LorryError):
    """The file can't be prepared for this base model because of the template, the tokenizer or a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A row as text, with the half-open ranges of its characters that are trained on."""

    text: str
    spans: tuple[tuple[int, int], ...]
    is_plain: bool = False
    """No chat template rendered it, so it lacks the tokens that begin and end a text."""
    is_marked: bool = False
    """The template marked its answers, instead of their being found by prefixes."""
    is_desirable: bool | None = None
    """The label of a single answer. None without a label."""
    line: int = 0
    """The line in the file, from 1. 0 if it comes from no file."""


class ChatTemplate:
    """One template with the special tokens that it may use."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.digest = sha256(source.encode()).hexdigest()
        self.marks_spans = GENERATION.search(source) is not None
        """The template marks the text that the model generates with {% generation %} blocks."""
        self.asks_for_date = "strftime_now" in source
        self._has_short_ids = CHECKS_ID_LENGTH.search(source) is not None
        self._special_tokens = dict(special_tokens)
        self._marks: tuple[str, str] = ("", "")
        self._shown: set[str] = set()
        """Whether the template has rendered `tools` and `tool calls` of a conversation. One without visible tools
        proves nothing about others, because some templates render tools only before a message of the user."""
        try:
            self._compiled = _environment(lambda: self._marks).from_string(source)
        except jinja2.TemplateError as error:
            raise _unusable(f"can't be read: {_short(error)}") from error

    @classmethod
    def load(cls, base_dir: Path) -> ChatTemplate:
        """Load the default template. Raises Refused."""
        source = _sources(base_dir).get("default")
        if not source:
            raise Refused("base_has_no_chat_template")
        return cls(source, special_tokens(base_dir))

    @classmethod
    def load_tool_use(cls, base_dir: Path) -> ChatTemplate | None:
        """Load the template for conversations with tools. None if the default one renders them. Raises Refused."""
        source = _sources(base_dir).get("tool_use")
        return cls(source, special_tokens(base_dir)) if source else None

    def render(self, chat: Chat, *, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation. Raises Refused if the template rejects it."""
        turns = [_turn(message, has_short_ids=self._has_short_ids) for message in chat.messages]
        try:
            return self._compiled.render(
                messages=turns,
                tools=chat.tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise Refused("template_refused_row", short=_short(error)) from error

    def render_prompt(self, chat: Chat) -> str:
        """Return the text up to the start of the next answer. Raises Refused, also for tools that are not rendered."""
        text = self.render(chat, add_generation_prompt=True)
        self._check_tools(chat, text, add_generation_prompt=True)
        return text

    def render_supervised(self, chat: Chat) -> Rendered:
        """Return the text and its assistant turns, except those of weight 0."""
        rendered = self._by_marks(chat) if self.marks_spans else self._by_prefixes(chat)
        self._check_tools(chat, rendered.text)
        return rendered

    def render_last(self, chat: Chat) -> Rendered:
        """Return the text and only its last turn, which is an assistant turn."""
        if self.marks_spans:
            rendered = self.render_supervised(chat)
            return replace(rendered, spans=rendered.spans[-1:])
        return self.render_supervised(only_last_trained(chat))

    def _check_tools(self, chat: Chat, text: str, *, add_generation_prompt: bool = False) -> None:
        """Raise Refused if the template does not render the tools or the tool calls of a conversation.

        Most templates ignore variables and keys that they don't know. Training would then teach empty answers.
        """
        if chat.tools:
            self._check_shown("tools", text, Chat(chat.messages), add_generation_prompt)
        if any("tool_calls" in message for message in chat.messages):
            without = Chat([_without_calls(turn) for turn in chat.messages], chat.tools)
            self._check_shown("tool calls", text, without, add_generation_prompt)

    def _check_shown(self, what: str, text: str, without: Chat, add_generation_prompt: bool) -> None:
        if what in self._shown:
            return
        try:
            is_shown = self.render(without, add_generation_prompt=add_generation_prompt) != text
        except Refused:
            is_shown = True  # it requires them
        if not is_shown:
            raise Refused("template_without_tools", element=what)
        self._shown.add(what)

    def _by_marks(self, chat: Chat) -> Rendered:
        """Find the {% generation %} blocks by rendering them between two characters that occur nowhere else."""
        plain = self.render(chat)
        self._marks = _unused_characters(plain)
        try:
            marked = self.render(chat)
        finally:
            start, stop = self._marks
            self._marks = ("", "")
        spans, text = _take_marks(marked, start, stop)
        if text != plain:
            raise _unusable("changes the text of its generation blocks, so their positions can't be determined")
        return Rendered(text=plain, spans=_weighted(spans, chat.messages), is_marked=True)

    def _by_prefixes(self, chat: Chat) -> Rendered:
        """Find each turn by rendering the text up to its start, with the generation prompt, and up to its end."""
        text, messages = self.render(chat), chat.messages
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            before = self._prompt(chat, index)
            is_last = index == len(messages) - 1
            text_to_end = text if is_last else self.render(replace(chat, messages=messages[: index + 1]))
            if not (text_to_end.startswith(before) and text.startswith(text_to_end)):
                raise self._not_prefix_stable(chat, index, text_to_end.removeprefix(before))
            spans.append((len(before), len(text_to_end)))
        return Rendered(text=text, spans=tuple(spans))

    def _not_prefix_stable(self, chat: Chat, index: int, answer: str) -> Refused:
        """Return the error for an answer whose position in the text can't be determined, with the cause if it is known.

        index: of the message. answer: its text while no message follows it.
        """
        number, is_last = index + 1, index == len(chat.messages) - 1
        without_system = [turn for turn in chat.messages if turn["role"] not in ("system", "developer")]
        if len(without_system) < len(chat.messages) and self._is_prefix_stable(replace(chat, messages=without_system)):
            return Refused("template_moves_system_message", models=TOOL_MODELS)
        if is_last:
            return Refused("template_changes_prompt")
        if "<think>" in answer:
            return Refused("template_drops_thoughts", number=number)
        if chat.tools and self._is_prefix_stable(replace(chat, tools=None)):
            return Refused("template_moves_tools")
        return Refused("template_changes_answer", number=number)

    def _is_prefix_stable(self, chat: Chat) -> bool:
        try:
            self._by_prefixes(chat)
        except Refused:
            return False
        return True

    def _prompt(self, chat: Chat, index: int) -> str:
        """Return the text before the answer. A conversation that begins with the answer has no messages to render, so
        this text is found by rendering a mark as the answer."""
        if index > 0:
            return self.render(replace(chat, messages=chat.messages[:index]), add_generation_prompt=True)
        mark, _ = _unused_characters(chat.messages[0]["content"])
        text = self.render(replace(chat, messages=[ChatMessage(role="assistant", content=mark)]))
        return text[: text.find(mark)] if mark in text else text


def _without_calls(message: ChatMessage) -> ChatMessage:
    kept = message.copy()
    kept.pop("tool_calls", None)
    return kept


def _turn(message: ChatMessage, *, has_short_ids: bool) -> dict[str, Any]:
    """Return a message for a template: without its weight, and with `system` for `developer`, because templates know
    only the older name. has_short_ids: with ids of calls that templates of Mistral accept."""
    turn: dict[str, Any] = {key: value for key, value in message.items() if key != "weight"}
    if message["role"] == "developer":
        turn["role"] = "system"
    if has_short_ids and "tool_calls" in message:
        turn["tool_calls"] = [{**call, "id": _short_id(call["id"])} for call in message["tool_calls"]]
    if has_short_ids and "tool_call_id" in message:
        turn["tool_call_id"] = _short_id(message["tool_call_id"])
    return turn


def _short_id(ident: str) -> str:
    """Return the id of a call as 9 letters and digits: itself, or else the start of its digest."""
    return ident if ID_OF_MISTRAL.fullmatch(ident) else sha256(ident.encode()).hexdigest()[:9]


def _weighted(spans: list[tuple[int, int]], messages: Sequence[ChatMessage]) -> tuple[tuple[int, int], ...]:
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if all(weights):
        return tuple(spans)
    if len(spans) != len(weights):
        raise Refused("template_hides_turns", num_spans=len(spans), num_weights=len(weights))
    return tuple(span for span, weight in zip(spans, weights, strict=True) if weight)


def _take_marks(marked: str, start: str, stop: str) -> tuple[list[tuple[int, int]], str]:
    """Return the ranges between the marks, and the text without the marks. The ranges refer to that text."""
    spans: list[tuple[int, int]] = []
    parts: list[str] = []
    length = 0
    span_start: int | None = None
    for piece in re.split(f"([{start}{stop}])", marked):
        if piece == start:
            span_start = length
        elif piece == stop:
            if span_start is not None and span_start < length:
                spans.append((span_start, length))
            span_start = None
        else:
            parts.append(piece)
            length += len(piece)
    return spans, "".join(parts)


def _unused_characters(text: str) -> tuple[str, str]:
    used = set(text)
    free = [chr(code) for code in PRIVATE_USE if chr(code) not in used]
    if len(free) < 2:
        raise _unusable("can't be analyzed, because the text contains every private-use character")
    return free[0], free[1]


def _sources(base_dir: Path) -> dict[str, str]:
    """Return the templates `default` and `tool_use`, if they exist. As in transformers, those in files replace those in
    tokenizer_config.json, which holds one template, or a list of named ones."""
    files = {"default": base_dir / "chat_template.jinja", "tool_use": base_dir / TOOL_USE}
    found = {name: path.read_text("utf-8") for name, path in files.items() if path.is_file()}
    if found:
        return found
    given = read_optional_json(base_dir / "tokenizer_config.json").get("chat_template")
    entries = cast(list[dict[str, Any]], given) if isinstance(given, list) else [{"name": "default", "template": given}]
    named = {str(entry.get("name")): entry.get("template") for entry in entries}
    return {name: template for name, template in named.items() if isinstance(template, str)}


def special_tokens(base_dir: Path) -> dict[str, str]:
    """Return the special tokens of a base model, such as bos_token, from the files in its folder."""
    maps = (read_optional_json(base_dir / name) for name in ("special_tokens_map.json", "tokenizer_config.json"))
    return {name: text for found in maps for name, text in _special_tokens(found).items()}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens in one file. Each is a text or an object with `content`."""
    found: dict[str, str] = {}
    for name in (f"{short}_token" for short in NAMED_TOKENS):
        value = config.get(name)
        value = cast(dict[str, Any], value).get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def read_optional_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, or an empty one if there is no such file."""
    return cast(dict[str, Any], json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _unusable(reason: str) -> Refused:
    return Refused("unusable_chat_template", reason=reason)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:MAX_MESSAGE_CHARS] or type(error).__name__


def _environment(marks: Callable[[], tuple[str, str]]) -> jinja2.Environment:
    """Return a sandboxed environment with everything that templates of the hub may rely on."""
    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=TEMPLATE_DATE.strftime,
        dict=_Dict(),
        namespace=_Namespace,
    )
    environment.generation_marks = marks
    return environment


class _Generation(jinja2.ext.Extension):
    """Renders {% generation %} … {% endgeneration %} as its text between the current marks."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        start, stop = cast(Any, self.environment).generation_marks()
        return f"{start}{caller()}{stop}"


class _Dict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` that rejects names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace can't hold {name!r}")
        super().__setitem__(name, value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def describe_templates(base_dir: Path) -> dict[str, bool]:
    """Return facts for the description of a base model.

    `has_chat_template`: without one, it can't be trained on messages. `renders_tools`: a template reads `tools`. If
    not, it can't answer requests with tools.
    """
    sources = _sources(base_dir)
    return {
        "has_chat_template": bool(sources.get("default")),
        "renders_tools": "tools" in sources.get("tool_use", sources.get("default", "")),
    }


def date_arguments(template: ChatTemplate) -> dict[str, str]:
    """Return the variables with which an engine that has a clock renders TEMPLATE_DATE, as in templates of Llama 3.2.

    Empty if the template asks for no date, or sets no variable to it.
    """
    return {"date_string": TEMPLATE_DATE.strftime(DATE_FORMAT)} if DATE_VARIABLE.search(template.source) else {}


DATE_FORMAT = "%d %b %Y"
DATE_VARIABLE = re.compile(rf"""date_string\s*=\s*strftime_now\(\s*["']{DATE_FORMAT}["']\s*\)""")
