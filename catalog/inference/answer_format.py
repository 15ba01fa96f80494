"""Parts of answers in OpenAI's format: the tool calls in a text, and the log-probabilities of /v1/completions. Pure.

Formats of tool calls, by the marks that models write: <tool_call>{"name", "arguments"}</tool_call> (Hermes, Qwen,
SmolLM2), [TOOL_CALLS][{"name", "arguments"}] (Mistral), and a bare {"name", "parameters"} with or without
<|python_tag|> (Llama 3.1 and later).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

from catalog.datasets.row_json import BadRow, parse_json

TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
LISTED = "[TOOL_CALLS]"
PYTHON_TAG = "<|python_tag|>"
MAX_CHARS = 2**20
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedCall:
    """A call of a function. `arguments` is JSON, as in OpenAI's format."""

    name: str
    arguments: str


def parse(text: str, *, names: Collection[str]) -> tuple[str, list[ParsedCall]]:
    """Return the text without calls, and the calls. If a call is malformed or names an unknown function, the text is
    returned unchanged and without calls, so that nothing of the answer is lost."""
    if len(text) > MAX_CHARS:
        return text, []
    for content, parts in _candidates(text):
        calls = [call for part in parts for call in _calls(part)]
        if calls and all(call.name in names for call in calls) and all(_calls(part) for part in parts):
            return content.strip(), calls
    return text, []


def _candidates(text: str) -> list[tuple[str, list[str]]]:
    """Return the remaining text and the JSON of the calls in each format that the answer may have."""
    if "<tool_call>" in text:
        return [(TAGGED.sub("", text), TAGGED.findall(text))]
    if LISTED in text:
        before, _, after = text.partition(LISTED)
        return [(before, [after])]
    bare = text.strip().removeprefix(PYTHON_TAG).strip()
    return (
        [("", [part for part in bare.split(";") if part.strip()]), ("", [bare])] if bare.startswith(("{", "[")) else []
    )


def _calls(text: str) -> list[ParsedCall]:
    """Return the calls in a JSON object or list of objects; none if it is neither, or if strict parsers reject it."""
    try:
        value: Any = parse_json(text)
    except (BadRow, json.JSONDecodeError):
        return []
    objects = cast(list[Any], value) if isinstance(value, list) else [value]
    found = [_call(each) for each in objects]
    return [call for call in found if call is not None] if all(found) else []


def _call(value: Any) -> ParsedCall | None:
    if not isinstance(value, dict):
        return None
    fields = cast(dict[str, Any], value)
    name, arguments = fields.get("name"), fields.get("arguments", fields.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except (BadRow, json.JSONDecodeError):
            return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ParsedCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))


def text_logprobs(tokens: Sequence[Json], *, start: int) -> Json:
    """Return OpenAI's older format. tokens: in the format of chats. start: characters of the answer before them, which
    `text_offset` counts.

    Of tokens with the same text, the sampled one counts, or else the most likely one.
    """
    offsets: list[int] = []
    for token in tokens:
        offsets.append(start)
        start += len(token["token"])
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in reversed(token["top_logprobs"])}
            | {token["token"]: token["logprob"]}
            for token in tokens
        ],
        "text_offset": offsets,
    }
