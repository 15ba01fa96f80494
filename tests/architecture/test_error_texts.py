"""The texts of errors: each is complete, and each error in the source code has a text with its values."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from catalog.error_texts import templates
from catalog.lifecycle.outcomes import decide
from catalog.states import ENDINGS, JobState
from lorry.errors import templates as client_templates
from tools.check_words import WORDS, Config
from tools.error_reference import entries

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "dashboard" / "errors.html").read_text("utf-8")
SERVER = {name: (text.message, text.remedy) for name, text in templates().items()}
CLIENT = {name: (text["message"], text["remedy"]) for name, text in client_templates().items()}
EXAMPLE = re.compile(r"\{\{.*\}\}")
"""A row of a training file as JSON, which counts as one word."""
CODE = re.compile(r"[a-z]+(_[a-z0-9]+)+")
MAKES_TEXT = re.compile(r"(\w+\.)*([A-Z]\w+|ErrorText\.of|text_of)|super\(\)\.__init__")
"""Functions whose first argument may be the name of a text."""
MOST_CODES = 150
MOST_MESSAGE_WORDS = 30
MOST_REMEDY_WORDS = 60
OWN_ARGUMENTS = {"param", "reason", "api_key_id", "retry_after_seconds", "headers", "quota", "status"}
"""Arguments of error classes that are not values of the text."""


class RaisedText(NamedTuple):
    """A call that makes one of these texts."""

    place: str
    names: tuple[str, ...]
    values: frozenset[str] | None
    """None: some are not written in the call."""


def raised_texts(packages: tuple[str, ...]) -> Iterator[RaisedText]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and node.args and MAKES_TEXT.fullmatch(ast.unparse(node.func)):
                    given = frozenset(keyword.arg or "**" for keyword in node.keywords)
                    names = tuple(name for name in _literals(node.args[0]) if CODE.fullmatch(name))
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    yield RaisedText(place, names, None if "**" in given else given - OWN_ARGUMENTS)


def _literals(node: ast.expr) -> Iterator[str]:
    """Yield the texts that an expression may have."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp():
            yield from _literals(node.body)
            yield from _literals(node.orelse)
        case _:
            pass


def used_names(packages: tuple[str, ...], names: set[str]) -> set[str]:
    """Return the names that occur in the source code, or that an f-string in it can produce."""
    used: set[str] = set()
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                match node:
                    case ast.Constant(value=str(text)) if text in names:
                        used.add(text)
                    case ast.JoinedStr(values=parts):
                        fixed = [part.value if isinstance(part, ast.Constant) else "\0" for part in parts]
                        produced = "".join(map(str, fixed))
                        if re.fullmatch(r"[a-z_\0]*[a-z]{4}[a-z_\0]*", produced):
                            pattern = re.compile(produced.replace("\0", r"\w+"))
                            used |= {name for name in names if pattern.fullmatch(name)}
                    case _:
                        pass
    return used


def placeholders(texts: tuple[str, str]) -> set[str]:
    return {field for text in texts for _, field, _, _ in string.Formatter().parse(text) if field is not None}


@pytest.mark.parametrize(
    ("packages", "texts"), [(("catalog", "api", "worker"), SERVER), (("lorry",), CLIENT)], ids=["server", "client"]
)
def test_each_text_is_used_with_its_values(packages: tuple[str, ...], texts: dict[str, tuple[str, str]]) -> None:
    names, wrong = set(texts), list[str]()
    for raised in raised_texts(packages):
        known = [placeholders(texts[name]) - OWN_ARGUMENTS for name in raised.names if name in texts]
        if known and raised.values is not None and raised.values != frozenset[str]().union(*known):
            wrong.append(f"{raised.place}: {raised.names} need {known}")
        if known and len(known) < len(raised.names):
            wrong.append(f"{raised.place}: no text for one of {raised.names}")

    assert wrong == []
    assert names - used_names(packages, names) == set()


def test_codes_are_few_and_have_one_form() -> None:
    codes = {entry.code for entry in entries()}

    assert len(codes) <= MOST_CODES
    assert [code for code in codes if re.fullmatch(r"[a-z]+(_[a-z0-9]+)*", code) is None] == []
    assert codes == set(re.findall(r'<section id="(\w+)">', PAGE))


def test_each_text_is_short_and_has_a_fix() -> None:
    texts = {**CLIENT, **SERVER}

    assert [name for name, (message, remedy) in texts.items() if not (message and remedy)] == []
    assert [name for name, (message, _) in texts.items() if _num_words(message) > MOST_MESSAGE_WORDS] == []
    assert [name for name, (_, remedy) in texts.items() if _num_words(remedy) > MOST_REMEDY_WORDS] == []


def test_each_text_ends_with_a_period() -> None:
    texts = [text for both in (*CLIENT.values(), *SERVER.values()) for text in both]

    assert [text for text in texts if re.search(r"[.?`}]$", text) is None] == []


def test_no_text_has_a_banned_word() -> None:
    config = Config.load(WORDS)
    texts = [text for both in (*CLIENT.values(), *SERVER.values()) for text in both]

    assert [(text, word) for text in texts for word in banned_words(text, config)] == []


def banned_words(text: str, config: Config) -> list[str]:
    from tools.check_words import findings

    return [word for _, word, _ in findings("text.md", text, config)]


def _num_words(text: str) -> int:
    return len(EXAMPLE.sub("{}", text).split())


def test_each_end_that_fails_a_job_has_a_text() -> None:
    failing = {reason for reason, ending in ENDINGS.items() if ending.state is JobState.FAILED}
    at_once = {reason.value for reason in failing if not ENDINGS[reason].retryable}
    quarantined = {
        f"quarantined_after_{reason.value}"
        for reason in failing
        if decide(reason, cancel_requested=False, pause_requested=False, counted_attempts=99, losses=99).is_quarantine
    }

    assert at_once | quarantined <= SERVER.keys()
