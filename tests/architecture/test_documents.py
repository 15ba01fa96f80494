"""The documents match the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import typer.main

from catalog.audit.log import AuditType
from catalog.states import ENDINGS, FINAL_STATES, TRANSITIONS
from lorry.cli.main import app
from tests.architecture.source_files import ROOT
from tools import reference_cli

LINKED = [*ROOT.glob("*.md"), ROOT / "llms.txt", ROOT / "client/README.md"]
"""MkDocs checks the links of the other documents, of which some lead to generated pages."""
DOCUMENTS = [*LINKED, *(ROOT / "docs").rglob("*.md")]
ARROW = re.compile(r"^\s*(\S+) --> (\S+?)(?:: (\w+))?\s*$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
WORDS = """base model, adapter, job, attempt, claim, lease, worker, trainer, pack, tick, slice, plan, sweep, trial,
flat adapter, artifact, manifest, lineage, project, API key"""

EACH = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def test_state_diagram_matches_the_transitions() -> None:
    arrows = ARROW.findall(_read("docs/reference/job-states.md"))

    moves = {(start, verb): end for start, end, verb in arrows if end != "[*]"}
    ends = {start for start, end, _ in arrows if end == "[*]"}
    assert moves == {((state or "[*]"), verb.value): end.value for (state, verb), end in TRANSITIONS.items()}
    assert ends == set(FINAL_STATES)


def test_table_of_end_reasons_matches_the_code() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| (yes|no) \| (yes|no) \|", _read("docs/reference/job-states.md"), re.MULTILINE
    )

    words = {True: "yes", False: "no"}
    expected = {(r.value, e.state.value, words[e.retryable], words[e.counts]) for r, e in ENDINGS.items()}
    assert set(rows) == expected


def test_glossary_defines_every_term() -> None:
    defined = set(re.findall(r"^### (.+)$", _read("docs/reference/glossary.md"), re.MULTILINE))

    assert {" ".join(word.split()) for word in WORDS.split(",")} <= defined


@pytest.mark.parametrize("document", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_are_not_broken(document: Path) -> None:
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
    commands = [
        line.split("#")[0].split()
        for line in _commands(document)
        if line.startswith("lorry ") and "[OPTIONS]" not in line
    ]

    assert [" ".join(words) for words in commands if not _is_command(words)] == []


@EACH
def test_documents_have_no_control_characters(document: Path) -> None:
    assert re.findall(r"[^\n]*[\x00-\x09\x0b-\x1f\x7f][^\n]*", document.read_bytes().decode()) == []


def test_command_line_reference_lists_all_commands_but_hidden_ones() -> None:
    page = reference_cli.page()

    shown = {path for path, is_hidden in _all_commands(typer.main.get_command(app), "lorry") if not is_hidden}
    assert len(shown) > 50
    assert set(re.findall(r"^#+ `(.+)`$", page, re.MULTILINE)) == shown


def _all_commands(group: Any, path: str, *, is_hidden: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield each command below a group, and whether it or a group above it is hidden."""
    for name, command in getattr(group, "commands", {}).items():
        hidden = is_hidden or command.hidden
        yield f"{path} {name}", hidden
        yield from _all_commands(command, f"{path} {name}", is_hidden=hidden)


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _commands(document: Path) -> list[str]:
    """Return the lines of a document's shell blocks, and its inline code."""
    text = document.read_text()
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def _is_command(words: list[str]) -> bool:
    """An alias is a command too."""
    command: Any = typer.main.get_command(app)
    for word in words[1:]:
        if not hasattr(command, "get_command"):
            return True
        if word.startswith(("-", "[")):
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


@EACH
def test_tests_named_in_documents_exist(document: Path) -> None:
    named = _named_tests(document.read_text("utf-8"))

    assert [name for file, name in named if f"def {name}(" not in _read(file)] == []


def test_security_tests_page_names_a_test_for_each_control() -> None:
    rows = re.findall(r"^\| (.+?) \| (`.+) \|$", _read("docs/contributing/security-tests.md"), re.MULTILINE)

    assert len(rows) > 100
    assert [control for control, tests in rows if not re.search(r"`tests/[\w/]+\.py", tests)] == []
    assert len(_named_tests(_read("docs/contributing/security-tests.md"))) > 200


def test_each_guarantee_names_a_test() -> None:
    guarantees = re.findall(r"^\| \*\*(.+?)\.\*\* .*$", _read("docs/explanation/equivalence.md"), re.MULTILINE)
    rows = re.findall(r"^\| \*\*.+$", _read("docs/explanation/equivalence.md"), re.MULTILINE)

    assert len(guarantees) == 7
    assert [row for row in rows if not _named_tests(row)] == []


def _named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)


def test_reference_names_every_audit_event() -> None:
    page = _read("docs/reference/audit-events.md")
    named: set[str] = set()
    for line in page.splitlines():
        of = ""
        for name in re.findall(r"`([a-z_]*\.[a-z_]+)`", line.split("|")[1]) if line.startswith("| `") else ():
            of = name.partition(".")[0] or of
            named.add(of + "." + name.partition(".")[2])

    assert set(get_args(AuditType)) - named == set()
