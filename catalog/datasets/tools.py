"""Validates tools and tool calls in rows, in OpenAI's format and in its deprecated format of functions.

Chat templates expect the arguments of a call as an object, so the string of the file is parsed. vLLM does the same
when it serves a conversation, so a model reads the same text in training and in production.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypedDict, cast

from catalog.datasets.row_json import MAX_NESTING, BadRow, TooDeep, kind_of, parse_json, problem_of, quoted

MAX_TOOLS = 128
"""OpenAI's maximum for one row."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
TOOL_FORM = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'
CALL_FORM = '{"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}'
FUNCTION_CALL_FORM = '{"name": "...", "arguments": "{...}"}'
FUNCTION_KEYS = frozenset({"name", "description", "parameters", "strict"})


class FunctionCall(TypedDict):
    """The called function, with parsed arguments."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """One call in an assistant message."""

    id: str
    type: str
    function: FunctionCall


def check_tools(place: str, given: Any) -> list[dict[str, Any]]:
    """Return the tools that a row offers to the model. Raises BadRow."""
    tools = _list(place, given, of="tools", form=TOOL_FORM)
    for index, tool in enumerate(tools):
        position = f"{place}[{index}]"
        fields = _object(position, tool, form=TOOL_FORM)
        _only_keys(position, fields, frozenset({"type", "function"}), form=TOOL_FORM)
        _check_type(position, fields, form=TOOL_FORM)
        _check_has_function(position, fields, form=TOOL_FORM)
        _check_function(f"{position}.function", fields["function"])
    _check_unique(place, [tool["function"]["name"] for tool in tools])
    return cast(list[dict[str, Any]], tools)


def check_functions(place: str, given: Any) -> list[dict[str, Any]]:
    """Return the tools of a row in the deprecated format, where `functions` lists them. Raises BadRow."""
    functions = _list(place, given, of="functions", form='{"name": "...", "parameters": {...}}')
    for index, function in enumerate(functions):
        _check_function(f"{place}[{index}]", function)
    _check_unique(place, [function["name"] for function in functions])
    return [{"type": "function", "function": function} for function in functions]


def check_tool_calls(place: str, given: Any) -> list[ToolCall]:
    """Return the calls of one assistant message. Raises BadRow."""
    if not isinstance(given, list) or not given:
        if given == []:
            raise BadRow("tool_calls_empty", place=place)
        raise BadRow("tool_calls_not_list", place=place, kind=kind_of(given))
    calls: list[ToolCall] = []
    for index, call in enumerate(cast(list[Any], given)):
        position = f"{place}[{index}]"
        fields = _object(position, call, form=CALL_FORM)
        _only_keys(position, fields, frozenset({"id", "type", "function"}), form=CALL_FORM)
        _check_type(position, fields, form=CALL_FORM)
        if not isinstance(fields.get("id"), str) or not fields["id"]:
            raise BadRow("tool_call_id_invalid", place=place, index=index, problem=_described(fields, "id"))
        _check_has_function(position, fields, form=CALL_FORM)
        function = checked_call(f"{position}.function", fields["function"])
        calls.append(ToolCall(id=fields["id"], type="function", function=function))
    repeated = _first_repeated(call["id"] for call in calls)
    if repeated is not None:
        raise BadRow("tool_call_id_repeated", place=place, repeated=quoted(repeated))
    return calls


def checked_call(place: str, given: Any) -> FunctionCall:
    """Return the function that a call names, with its arguments. Raises BadRow."""
    fields = _object(place, given, form=FUNCTION_CALL_FORM)
    _only_keys(place, fields, frozenset({"name", "arguments"}), form=FUNCTION_CALL_FORM)
    name = _checked_name(place, fields)
    arguments = fields.get("arguments")
    if not isinstance(arguments, str):
        raise BadRow("call_arguments_not_text", place=place, problem=_described(fields, "arguments"))
    return FunctionCall(name=name, arguments=_parsed(f"{place}.arguments", arguments))


def _parsed(place: str, arguments: str) -> dict[str, Any]:
    """Return the arguments of a call. A function without parameters may be called with an empty string."""
    if not arguments.strip():
        return {}
    try:
        value = parse_json(arguments)
    except TooDeep as error:
        raise BadRow("call_arguments_too_deep", place=place, max_nesting=MAX_NESTING) from error
    except BadRow as error:
        raise BadRow(replace(error.text, message=f"in {place}, {error.text.message}")) from error
    except json.JSONDecodeError as error:
        raise BadRow("call_arguments_not_json", place=place, problem=problem_of(error), pos=error.pos + 1) from error
    if not isinstance(value, dict):
        raise BadRow("call_arguments_not_object", place=place, kind=kind_of(value))
    return cast(dict[str, Any], value)


def _check_function(place: str, given: Any) -> None:
    form = '{"name": "...", "description": "...", "parameters": {...}}'
    fields = _object(place, given, form=form)
    _only_keys(place, fields, FUNCTION_KEYS, form=form)
    _checked_name(place, fields)
    for key, wanted, noun in (("description", str, "a string"), ("parameters", dict, "an object")):
        if fields.get(key) is not None and not isinstance(fields[key], wanted):
            raise BadRow(
                "function_parameters_invalid" if key == "parameters" else "function_description_invalid",
                place=place,
                key=key,
                kind=kind_of(fields[key]),
                wanted=noun,
            )
    if not isinstance(fields.get("strict"), bool | None):
        raise BadRow("function_strict_not_boolean", place=place, kind=kind_of(fields["strict"]))


def _checked_name(place: str, fields: dict[str, Any]) -> str:
    name = fields.get("name")
    if not isinstance(name, str):
        raise BadRow("function_name_not_text", place=place, problem=_described(fields, "name"))
    if NAME.fullmatch(name) is None:
        raise BadRow("invalid_function_name", place=place, name=quoted(name))
    return name


def _check_unique(place: str, names: list[str]) -> None:
    repeated = _first_repeated(names)
    if repeated is not None:
        raise BadRow("function_defined_twice", place=place, repeated=quoted(repeated))


def _first_repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def _check_type(place: str, fields: dict[str, Any], *, form: str) -> None:
    if fields.get("type") != "function":
        kind = fields.get("type")
        shown = f"is {quoted(kind)}, not 'function'" if isinstance(kind, str) else _described(fields, "type")
        raise BadRow("invalid_tool_type", place=place, shown=shown, form=form)


def _list(place: str, given: Any, *, of: str, form: str) -> list[Any]:
    if not isinstance(given, list):
        raise BadRow("tools_not_list", place=place, kind=kind_of(given), of=of, form=form)
    items = cast(list[Any], given)
    if len(items) > MAX_TOOLS:
        raise BadRow("too_many_tools", place=place, num_items=len(items), of=of, max_tools=MAX_TOOLS)
    return items


def _object(place: str, given: Any, *, form: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise BadRow("tool_not_object", place=place, kind=kind_of(given), form=form)
    return cast(dict[str, Any], given)


def _only_keys(place: str, fields: dict[str, Any], known: frozenset[str], *, form: str) -> None:
    for key in fields:
        if key not in known:
            raise BadRow("unknown_tool_key", place=place, key=quoted(key), form=form)


def _check_has_function(place: str, fields: dict[str, Any], *, form: str) -> None:
    if "function" not in fields:
        raise BadRow("tool_without_function", place=place, form=form)


def _described(fields: dict[str, Any], key: str) -> str:
    """Return what is wrong with a string: `is missing`, `is empty`, or `is a number, not a string`."""
    if key not in fields:
        return "is missing"
    return "is empty" if fields[key] == "" else f"is {kind_of(fields[key])}, not a string"
