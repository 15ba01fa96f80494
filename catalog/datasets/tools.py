"""Validates tools and tool calls in rows, in OpenAI's format and in its deprecated format of functions.

Chat templates expect the arguments of a call as an object, so the string of the file is parsed. vLLM does the same
when it serves a conversation, so a model reads the same text in training and in production.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, TypedDict, cast

from catalog.datasets.row_json import MAX_NESTING, BadRow, kind_of, parse_json, problem_of, quoted

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
        described = "an empty list" if given == [] else f"{kind_of(given)}, not a list"
        remedy = f"Use a list of calls, such as [{CALL_FORM}], or omit the key."
        raise BadRow("invalid_tool_calls", f"{place} is {described}", remedy)
    calls: list[ToolCall] = []
    for index, call in enumerate(cast(list[Any], given)):
        position = f"{place}[{index}]"
        fields = _object(position, call, form=CALL_FORM)
        _only_keys(position, fields, frozenset({"id", "type", "function"}), form=CALL_FORM)
        _check_type(position, fields, form=CALL_FORM)
        if not isinstance(fields.get("id"), str) or not fields["id"]:
            remedy = "Use a string that is unique in the row, such as 'call_1'."
            raise BadRow("invalid_tool_calls", f"{position}.id {_described(fields, 'id')}", remedy)
        _check_has_function(position, fields, form=CALL_FORM)
        function = checked_call(f"{position}.function", fields["function"])
        calls.append(ToolCall(id=fields["id"], type="function", function=function))
    repeated = _first_repeated(call["id"] for call in calls)
    if repeated is not None:
        remedy = "Give each call its own ID."
        raise BadRow("invalid_tool_calls", f"{place} has several calls with the ID {quoted(repeated)}", remedy)
    return calls


def checked_call(place: str, given: Any) -> FunctionCall:
    """Return the function that a call names, with its arguments. Raises BadRow."""
    fields = _object(place, given, form=FUNCTION_CALL_FORM)
    _only_keys(place, fields, frozenset({"name", "arguments"}), form=FUNCTION_CALL_FORM)
    name = _checked_name(place, fields)
    arguments = fields.get("arguments")
    if not isinstance(arguments, str):
        reason = f"{place}.arguments {_described(fields, 'arguments')}"
        raise BadRow("invalid_arguments", reason, 'Use a JSON object as a string, such as "{\\"city\\": \\"Paris\\"}".')
    return FunctionCall(name=name, arguments=_parsed(f"{place}.arguments", arguments))


def _parsed(place: str, arguments: str) -> dict[str, Any]:
    """Return the arguments of a call. A function without parameters may be called with an empty string."""
    remedy = 'Use a JSON object as a string, such as "{\\"city\\": \\"Paris\\"}", or "{}" if there are no arguments.'
    if not arguments.strip():
        return {}
    try:
        value = parse_json(arguments)
    except BadRow as error:
        if error.code == "json_too_deep":
            reason = f"{place} is nested too deeply: it has more than {MAX_NESTING} levels of lists and objects"
            raise BadRow("invalid_arguments", reason, "Flatten the arguments.") from error
        raise BadRow(error.code, f"in {place}, {error.reason}", error.remedy) from error
    except json.JSONDecodeError as error:
        reason = f"{place} is not valid JSON: {problem_of(error)} at character {error.pos + 1}"
        raise BadRow("invalid_arguments", reason, remedy) from error
    if not isinstance(value, dict):
        raise BadRow("invalid_arguments", f"{place} contains {kind_of(value)}, not an object", remedy)
    return cast(dict[str, Any], value)


def _check_function(place: str, given: Any) -> None:
    form = '{"name": "...", "description": "...", "parameters": {...}}'
    fields = _object(place, given, form=form)
    _only_keys(place, fields, FUNCTION_KEYS, form=form)
    _checked_name(place, fields)
    for key, wanted, noun in (("description", str, "a string"), ("parameters", dict, "an object")):
        if fields.get(key) is not None and not isinstance(fields[key], wanted):
            hint = "Use a JSON schema of type object" if key == "parameters" else "Use a string"
            raise BadRow(
                "invalid_tools", f"{place}.{key} is {kind_of(fields[key])}, not {noun}", f"{hint}, or omit it."
            )
    if not isinstance(fields.get("strict"), bool | None):
        reason = f"{place}.strict is {kind_of(fields['strict'])}, not true or false"
        raise BadRow("invalid_tools", reason, "Use true or false, or omit it.")


def _checked_name(place: str, fields: dict[str, Any]) -> str:
    name = fields.get("name")
    if not isinstance(name, str):
        reason = f"{place}.name {_described(fields, 'name')}"
        raise BadRow("invalid_function_name", reason, "Use the function's name, such as 'get_weather'.")
    if NAME.fullmatch(name) is None:
        remedy = "Use 1 to 64 letters, digits, dots, underscores and hyphens."
        raise BadRow("invalid_function_name", f"{place}.name is {quoted(name)}, which is not a valid name", remedy)
    return name


def _check_unique(place: str, names: list[str]) -> None:
    repeated = _first_repeated(names)
    if repeated is not None:
        remedy = "Keep only one definition, or rename the others."
        raise BadRow("invalid_tools", f"{place} defines the function {quoted(repeated)} more than once", remedy)


def _first_repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def _check_type(place: str, fields: dict[str, Any], *, form: str) -> None:
    if fields.get("type") != "function":
        kind = fields.get("type")
        shown = f"is {quoted(kind)}, not 'function'" if isinstance(kind, str) else _described(fields, "type")
        raise BadRow("invalid_tool_type", f"{place}.type {shown}", f"Only functions are supported. Use {form}.")


def _list(place: str, given: Any, *, of: str, form: str) -> list[Any]:
    if not isinstance(given, list):
        raise BadRow("invalid_tools", f"{place} is {kind_of(given)}, not a list", f"Use a list of {of}: [{form}].")
    items = cast(list[Any], given)
    if len(items) > MAX_TOOLS:
        reason = f"{place} has {len(items)} {of}, but the maximum is {MAX_TOOLS}"
        raise BadRow("invalid_tools", reason, "Remove those that the conversation does not need.")
    return items


def _object(place: str, given: Any, *, form: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise BadRow("invalid_tools", f"{place} is {kind_of(given)}, not an object", f"Use {form}.")
    return cast(dict[str, Any], given)


def _only_keys(place: str, fields: dict[str, Any], known: frozenset[str], *, form: str) -> None:
    for key in fields:
        if key not in known:
            remedy = f"Remove the key, or correct its spelling or position. Use {form}."
            raise BadRow("unknown_key", f"{place} has an unknown key, {quoted(key)}", remedy)


def _check_has_function(place: str, fields: dict[str, Any], *, form: str) -> None:
    if "function" not in fields:
        raise BadRow("invalid_tools", f"{place}.function is missing", f"Use {form}.")


def _described(fields: dict[str, Any], key: str) -> str:
    """Return what is wrong with a string: `is missing`, `is empty`, or `is a number, not a string`."""
    if key not in fields:
        return "is missing"
    return "is empty" if fields[key] == "" else f"is {kind_of(fields[key])}, not a string"
