"""The reference page of the command line, written by Typer."""

import re
from typing import Any

import typer
import typer.cli
import typer.main

from lorry.cli.main import app

EXAMPLES = re.compile(r"^\x08?\nExamples:\n((?:  .+\n)+)", re.MULTILINE)


def page() -> str:
    command: Any = typer.main.get_command(app)
    _shorten(command)
    text = typer.cli.get_docs_for_click(obj=command, ctx=typer.Context(command), name="lorry", title="Command line")
    text = text.replace(" []...", "")  # a hidden argument
    return EXAMPLES.sub(lambda match: f"**Examples**:\n\n```sh\n{re.sub('^  ', '', match[1], flags=re.M)}```\n", text)


def _shorten(command: Any) -> None:
    """Set the summary of each command, which is else cut after 45 characters."""
    for each in getattr(command, "commands", {}).values():
        each.short_help = re.split(r"(?<=\.)\s", each.help or "", maxsplit=1)[0]
        _shorten(each)
