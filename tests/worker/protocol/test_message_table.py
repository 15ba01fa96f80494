"""The table of messages and events in worker/protocol/mailbox.py agrees with the code that sends and handles them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from worker.children.trainer.message_handlers import RELEASING
from worker.children.trainer.outputs import EVENT_TYPES
from worker.protocol import mailbox
from worker.protocol.mailbox import Verb

WORKER = Path(mailbox.__file__).parents[1]
UNHANDLED = {"unloaded"}
"""Only for readers of the file: the worker observes the exit of the process itself."""


def table(title: str) -> dict[str, list[str]]:
    """Return the field names of each message. An optional field ends with a question mark."""
    _, _, rest = (mailbox.__doc__ or "").partition(f"    {title} ")
    rows: dict[str, str] = {}
    names = ""
    for line in rest.partition("\n\n")[0].splitlines()[1:]:
        names, fields_of_line = line[4:28].strip() or names, line[28:]
        rows[names] = f"{rows.get(names, '')} {fields_of_line}"
    return {name: re.findall(r"(\w+\??):", row) for names, row in rows.items() for name in names.split(", ")}


MESSAGES, EVENTS = table("To the trainer"), table("From the trainer")
REQUESTS, TOKENS = table("To it, by pipe"), table("From it, by pipe")


def strings(node: ast.expr) -> Iterator[str]:
    return (text for part in ast.walk(node) if (text := text_of(part)) is not None)


def text_of(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def nodes(*places: str) -> Iterator[ast.AST]:
    for place in places:
        for path in sorted((WORKER / place).rglob("*.py")) or [WORKER / place]:
            yield from ast.walk(ast.parse(path.read_text()))


def calls(method: str, *places: str) -> Iterator[ast.Call]:
    for node in nodes(*places):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            yield node


def compared_with(name: str, *places: str) -> set[str]:
    """Return the strings with which an attribute or a key of this name is compared."""
    return {
        text
        for node in nodes(*places)
        if isinstance(node, ast.Compare)
        and (name in strings(node.left) or (isinstance(node.left, ast.Attribute) and node.left.attr == name))
        for comparator in node.comparators
        for text in strings(comparator)
    }


def sent_events() -> dict[str, set[str]]:
    """Return the named fields of each event that the trainer writes."""
    found = {
        name: {"claim_id", *(field.name for field in fields(event) if field.name != "job")}
        for event, name in EVENT_TYPES.items()
    }
    for call in calls("_report_event", "children/trainer"):
        (name,) = strings(call.args[1])
        found.setdefault(name, {"claim_id"}).update(keyword.arg for keyword in call.keywords if keyword.arg)
    for node in nodes("children/trainer"):
        if isinstance(node, ast.Dict):
            values = dict(zip(map(text_of, node.keys), node.values, strict=True))
            if (name := text_of(values.pop("type", None))) is not None:
                found.setdefault(name, set()).update(key for key in values if key is not None)
    return found


def handled_events() -> set[str]:
    tables = {
        key
        for node in nodes("session/event_handlers.py")
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)
        for each in node.value.keys
        if each is not None
        for key in strings(each)
    }
    return tables | compared_with("type", "session/trainer_session.py")


def test_the_table_lists_the_verbs_that_the_trainer_handles_and_no_others() -> None:
    handled = compared_with("verb", "children/trainer") | set(RELEASING)

    assert set(MESSAGES) == set(get_args(Verb))
    assert {*MESSAGES, *REQUESTS} == handled
    assert {text_of(call.args[0]) for call in calls("send", "inference/session.py")} == set(REQUESTS)


def test_the_table_lists_the_events_that_the_trainer_sends_and_no_others() -> None:
    assert {*EVENTS, *TOKENS} == set(sent_events())


def test_the_worker_handles_every_event_of_the_table_except_unloaded() -> None:
    assert handled_events() == set(EVENTS) - UNHANDLED
    assert compared_with("type", "inference/session.py") >= {"answered", "unanswered"}
    assert compared_with("type", "inference/server.py") - {"waiting", "http.disconnect"} == set(TOKENS) - {"answered"}


@pytest.mark.parametrize("event", sorted({**EVENTS, **TOKENS}))
def test_the_table_names_every_field_that_the_trainer_writes_by_name(event: str) -> None:
    assert sent_events()[event] <= {name.removesuffix("?") for name in {**EVENTS, **TOKENS}[event]}
