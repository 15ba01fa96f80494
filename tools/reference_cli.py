"""The reference page of the command line. Hidden commands, arguments and options are left out."""

from collections.abc import Iterator
from typing import Any

import typer
import typer.main

LONGEST_SUMMARY = 200


def page() -> str:
    from lorry.cli.main import app  # reads job_options.json, which `make docs` has written by now

    command: Any = typer.main.get_command(app)
    return "\n".join(_section(command, "lorry", "# Command line")).rstrip() + "\n"


def _section(command: Any, path: str, heading: str) -> Iterator[str]:
    """Yield the lines of a command, and of its subcommands."""
    context: Any = typer.Context(command)
    parameters = [parameter for parameter in command.get_params(context) if not parameter.hidden]
    yield from (heading, "")
    if command.help:
        yield from (command.help, "")
    usage = [command.options_metavar, *(piece for each in parameters for piece in each.get_usage_pieces(context))]
    subcommands = _subcommands(command)
    usage += [command.subcommand_metavar] if subcommands else []
    yield from ("**Usage**:", "", "```console", f"$ {path} {' '.join(usage)}", "```", "")
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        records = [each.get_help_record(context) for each in parameters if each.param_type_name == kind]
        yield from _listed(title, [(f"`{name}`", text) for name, text in filter(None, records)])
    if examples := [line.strip() for line in (command.epilog or "").splitlines()[2:]]:
        yield from ("**Examples**:", "", "```sh", *examples, "```", "")
    summaries = [(each.name, each.get_short_help_str(LONGEST_SUMMARY)) for each in subcommands]
    anchor = path.replace(" ", "-")
    yield from _listed("Commands", [(f"[`{name}`](#{anchor}-{name})", text) for name, text in summaries])
    level = "#" * (len(path.split()) + 1)
    for each in subcommands:
        yield from _section(each, f"{path} {each.name}", f"{level} `{path} {each.name}`")


def _subcommands(command: Any) -> list[Any]:
    return list(getattr(command, "commands", {}).values())


def _listed(title: str, records: list[tuple[str, str]]) -> Iterator[str]:
    if records:
        yield from (f"**{title}**:", "", *(f"* {name}: {text}" if text else f"* {name}" for name, text in records), "")
