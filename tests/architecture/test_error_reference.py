"""Every code that the service may store or send has an entry in the error reference, to which `doc_url` points."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from catalog.inference.engines import NOT_BEGUN
from catalog.lifecycle.outcomes import REMEDIES
from catalog.states import ENDINGS, EndReason, JobState
from tools.error_catalog import error_messages

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "dashboard" / "errors.html").read_text("utf-8")
ENTRIES = frozenset(re.findall(r'<section id="(\w+)">', PAGE))
EXAMPLE = re.compile(r"\{\".*\}")
"""A row of a training file as JSON, which counts as one word."""
MOST_MESSAGE_WORDS = 25
MOST_REMEDY_WORDS = 30


def test_every_end_of_a_failed_job_has_an_entry() -> None:
    failing = {reason for reason, ending in ENDINGS.items() if ending.state is JobState.FAILED}
    at_once = {reason.value for reason in failing if not ENDINGS[reason].retryable}

    assert at_once == {EndReason.USER_ERROR, EndReason.DIVERGED, EndReason.VERIFICATION_FAILED}
    assert at_once | {"quarantined"} <= ENTRIES
    assert set(REMEDIES) <= failing, "reasons that quarantine a job end it with the code 'quarantined'"


def test_every_stored_error_has_an_entry() -> None:
    stored = dict(stored_codes())

    assert {"quarantined", "diverged", "preparation_lost", "node_failed", "out_of_space"} <= set(stored)
    assert {code: place for code, place in stored.items() if code not in {*ENTRIES, NOT_BEGUN}} == {}


def test_every_raised_error_has_an_entry() -> None:
    assert {entry.code for entry in error_messages()} == ENTRIES


@pytest.mark.parametrize("code", ["quarantined", "user_error", "verification_failed", "preparation_lost"])
def test_an_entry_says_what_to_do(code: str) -> None:
    assert all(entry.message and entry.remedy for entry in error_messages() if entry.code == code)


def test_every_error_is_short_and_has_a_fix() -> None:
    entries = error_messages()

    assert [entry for entry in entries if not (entry.message and entry.remedy)] == []
    assert [entry for entry in entries if _num_words(entry.message) > MOST_MESSAGE_WORDS] == []
    assert [entry for entry in entries if _num_words(entry.remedy) > MOST_REMEDY_WORDS] == []
    assert _num_words("One two. / One two three.") == 3


def _num_words(text: str) -> int:
    """Return the number of words of the longest alternative. The catalog separates alternatives with a slash."""
    return max(len(EXAMPLE.sub("{}", part).split()) for part in text.split(" / "))


def stored_codes() -> Iterator[tuple[str, str]]:
    """Yield the codes of all dictionaries `{"code": "…", "message": …}` in the source, each with its place."""
    for package in ("catalog", "worker", "api", "lora_core"):
        for path in sorted((ROOT / package).rglob("*.py")):
            place = path.relative_to(ROOT)
            if place.is_relative_to("api/schemas"):  # examples
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Dict):
                    keys = {key.value: value for key, value in zip(node.keys, node.values, strict=True)
                            if isinstance(key, ast.Constant)}  # fmt: skip
                    if "message" in keys and "code" in keys:
                        yield from ((code, f"{place}:{node.lineno}") for code in _texts(keys["code"], place))


def _texts(node: ast.expr, path: Path) -> list[str]:
    match node:
        case ast.Constant(value=str(code)):
            return [code]
        case ast.Name(id=name) if name.isupper():
            module = importlib.import_module(".".join(path.with_suffix("").parts))
            return [str(getattr(module, name))]
        case _:
            return []
