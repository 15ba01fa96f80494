"""Checks of a block without running it: its syntax, and that its commands and options exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import typer
import typer.main

from lorry.cli.main import app
from tests.docs.pages import FENCE, ROOT, Block

COMMAND_START = re.compile(r"(?:^|[|;&(]|\bdo|\bthen)\s*(?:[A-Z_]+=\S*\s+)*(lorry|make)(?=\s|$)", re.MULTILINE)
COMMAND_END = {"|", "||", "&", "&&", ";", ")", "<", ">", ">>"}
INLINE = re.compile(r"`(lorry [^`\n…]+)`")
SUBSTITUTION = re.compile(r"\$\([^()]*\)")
HERE_DOCUMENT = re.compile(r"<<-?\s*'?(\w+)'?[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
UsageError: Any = typer.BadParameter.__base__
"""Typer may bundle its own copy of Click, and exports only the subclass."""
TARGETS = frozenset(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def problems(block: Block) -> Iterator[str]:
    if block.language == "python":
        try:
            compile(block.text, f"line {block.line}", "exec")
        except SyntaxError as error:
            yield str(error)
        return
    syntax = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    yield from syntax.stderr.splitlines()
    for words in _commands(block.text):
        if words[0] == "make":
            yield from (f"make {word}: no such target" for word in words[1:] if "=" not in word and word not in TARGETS)
        elif (problem := _problem_of_lorry(words[1:])) is not None:
            yield f"{shlex.join(words)}: {problem}"


def problems_of_sentences(text: str) -> Iterator[str]:
    """Check that a reader can run the commands in the sentences and tables of a page."""
    for command in INLINE.findall(FENCE.sub("", text)):
        for words in _commands(command):
            problem = _problem_of_lorry(words[1:])
            if problem is not None:
                yield f"{shlex.join(words)}: {problem}"


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each `lorry` and `make` command."""
    text = HERE_DOCUMENT.sub("", text).replace("\\\n", " ")
    for start in COMMAND_START.finditer(text):
        if "#" in text[text.rfind("\n", 0, start.start(1)) + 1 : start.start(1)]:
            continue
        line = text[start.start(1) :].partition("\n")[0]
        while line != (line := SUBSTITUTION.sub("value", line)):
            pass
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
        words.whitespace_split = True
        found: list[str] = []
        try:
            for word in words:
                if word in COMMAND_END:
                    break
                found.append(word)
        except ValueError as error:  # a quoted string that continues on another line
            yield ["lorry", f"--{error}"]
        yield found


def _problem_of_lorry(words: list[str]) -> str | None:
    """Parse the words as the command line does, without running the command."""
    command: Any = typer.main.get_command(app)
    context: Any = typer.Context(command, info_name="lorry")
    while hasattr(command, "get_command"):
        if not words or words[0].startswith("-"):
            return None
        name, *words = words
        found = command.get_command(context, name)
        if found is None:
            return f"no such command {name!r}"
        command, context = found, typer.Context(found, info_name=name, parent=context)
    if "--help" in words:
        return None
    try:
        command.make_context(context.info_name, list(words), parent=context.parent)
    except UsageError as error:
        return None if "does not exist" in error.message or "$" in error.message else error.message
    return None
