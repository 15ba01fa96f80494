"""The documents say what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import typer.main

from catalog.audit.log import AuditType
from catalog.states import ENDINGS, FINAL_STATES, TRANSITIONS
from lorry.cli.main import app
from tests.architecture.source_files import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), ROOT / "client/README.md", *(ROOT / "docs").rglob("*.md")]
ARROW = re.compile(r"^\s*(\S+) --> (\S+?)(?:: (\w+))?\s*$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
WORDS = """base model, adapter, job, attempt, claim, lease, worker, trainer, pack, tick, slice, plan, sweep, trial,
flat adapter, artifact, manifest, lineage, project, API key"""

EACH = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def test_the_diagram_of_states_is_the_table_of_transitions() -> None:
    arrows = ARROW.findall(_read("docs/STATE_MACHINE.md"))

    moves = {(start, verb): end for start, end, verb in arrows if end != "[*]"}
    ends = {start for start, end, _ in arrows if end == "[*]"}
    assert moves == {((state or "[*]"), verb.value): end.value for (state, verb), end in TRANSITIONS.items()}
    assert ends == set(FINAL_STATES)


def test_the_table_of_endings_is_the_one_that_is_obeyed() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| (yes|no) \| (yes|no) \|", _read("docs/STATE_MACHINE.md"), re.MULTILINE
    )

    words = {True: "yes", False: "no"}
    expected = {(r.value, e.state.value, words[e.retryable], words[e.counts]) for r, e in ENDINGS.items()}
    assert set(rows) == expected


def test_the_glossary_has_every_word() -> None:
    defined = set(re.findall(r"^\*\*(.+?)\*\*", _read("docs/GLOSSARY.md"), re.MULTILINE))

    assert {" ".join(word.split()) for word in WORDS.split(",")} <= defined


@EACH
def test_every_link_leads_somewhere(document: Path) -> None:
    broken = [
        target + anchor
        for target, anchor in LINK.findall(document.read_text())
        if not target.startswith(("http://", "https://", "mailto:"))
        and not _leads_somewhere(document.parent / target if target else document, anchor)
    ]

    assert broken == []


@EACH
def test_every_make_command_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", _read("Makefile"), re.MULTILINE))

    named = {name for line in _commands(document) for name in re.findall(r"^make ([a-z][a-z-]*)", line)}

    assert named <= targets


@EACH
def test_every_lorry_command_exists(document: Path) -> None:
    commands = [line.split("#")[0].split() for line in _commands(document) if line.startswith("lorry ")]

    assert [" ".join(words) for words in commands if not _is_command(words)] == []


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _commands(document: Path) -> list[str]:
    """The lines of its blocks of shell, and its inline code."""
    text = document.read_text()
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def _is_command(words: list[str]) -> bool:
    command: Any = typer.main.get_command(app)
    for word in words[1:]:
        if not hasattr(command, "get_command"):
            return True
        if word.startswith("-"):
            continue
        command = command.get_command(typer.Context(command), word)  # accepts synonyms of verbs too
        if command is None:
            return False
    return True


def _leads_somewhere(target: Path, anchor: str) -> bool:
    if not target.exists():
        return False
    if not anchor or target.suffix != ".md":
        return True
    headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
    return anchor[1:] in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_test_that_the_security_page_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "SECURITY.md").read_text("utf-8"))

    assert len(named) > 20
    assert [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text("utf-8")] == []


def test_the_security_page_names_every_event_of_the_audit_log() -> None:
    page = (ROOT / "docs/SECURITY.md").read_text("utf-8")
    named: set[str] = set()
    for line in page.splitlines():
        of = ""
        for name in re.findall(r"`([a-z_]*\.[a-z_]+)`", line.split("|")[1]) if line.startswith("| `") else ():
            of = name.partition(".")[0] or of
            named.add(of + "." + name.partition(".")[2])

    assert set(get_args(AuditType)) - named == set()
