"""The base of every group of commands: help with examples, and errors as a sentence with an exit code."""

from __future__ import annotations

import functools
import inspect
import os
import re
from contextlib import ExitStack
from contextvars import ContextVar
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from lorry.cli.render import output

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorry.client import Lorry

EXIT_REFUSED = 1
EXIT_NOT_CHECKED = 3
EXIT_INTERRUPTED = 130
SYNONYMS = (
    ("create", "add", "new"),
    ("delete", "remove", "rm"),
    ("list", "ls"),
    ("show", "get", "view", "describe"),
    ("update", "change", "edit", "set"),
)
"""Verbs that a group accepts for its own verb of the same row."""
RELATED = (("delete", "revoke", "archive", "cancel"), ("create", "submit", "run", "upload"))
"""Verbs that act differently: a group suggests its own verb of the same row, and runs nothing."""
Function = TypeVar("Function", bound="Callable[..., Any]")
_closed_at_the_end: ContextVar[ExitStack] = ContextVar("closed_at_the_end")


class CommandGroup(TyperGroup):
    """Accepts synonyms of its verbs, and prints an error as a sentence on stderr."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, self._own_verb(SYNONYMS, cmd_name) or cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            verb = next((row[0] for row in SYNONYMS if args[0] in row), args[0])
            if own := self._own_verb(RELATED, verb):
                ctx.fail(f"No such command {args[0]!r}. Did you mean {own!r}?")
        return super().resolve_command(ctx, args)

    def _own_verb(self, rows: tuple[tuple[str, ...], ...], verb: str) -> str | None:
        if verb in self.commands:
            return None
        return next((own for row in rows if verb in row for own in row if own in self.commands), None)

    def invoke(self, ctx: Any) -> Any:
        from lorry.errors import LorryError

        try:
            with ExitStack() as stack:
                _closed_at_the_end.set(stack)
                return super().invoke(ctx)
        except LorryError as error:
            _print_error(error)
            raise typer.Exit(EXIT_REFUSED) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            output.echo(f"Error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
            raise typer.Exit(EXIT_REFUSED) from None


class Command(TyperCommand):
    """A command whose help groups its options by their `rich_help_panel`; options without one come last.

    An option that takes one value may be passed only once.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        parser: Any = self.make_parser(ctx)
        _, _, order = parser.parse_args(args=list(args))
        for param in dict.fromkeys(order):
            takes_one = param.param_type_name == "option" and not param.multiple and not param.is_flag
            if takes_one and order.count(param) > 1:
                times = "twice" if order.count(param) == 2 else f"{order.count(param)} times"
                ctx.fail(f"{param.opts[0]} was passed {times}. Pass it only once.")
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = _simplified(error.message)
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        rest: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record: tuple[str, str] | None = param.get_help_record(ctx)
            if record is not None:
                title = "Arguments" if param.param_type_name == "argument" else getattr(param, "rich_help_panel", None)
                (sections.setdefault(title, []) if title else rest).append(record)
        for title, records in {**sections, "Options": rest}.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Verbs(typer.Typer):
    """A group of commands, each with examples."""

    def verb(self, name: str, *examples: str) -> Callable[[Function], Function]:
        """Register a function as a command."""

        def register(function: Function) -> Function:
            command = self.command(name, cls=Command, epilog=example_text(*examples))
            command(_with_output_option(function))
            return function

        return register


def example_text(*examples: str) -> str:
    """Return an epilog. Click does not wrap the lines of a paragraph that begins with `\\b`."""
    return "\n".join(("\b", "Examples:", *(f"  {example}" for example in examples))) if examples else ""


def group(help_text: str, *examples: str) -> Verbs:
    """Return an empty group. Without a subcommand it prints its help."""
    return Verbs(
        cls=CommandGroup,
        help=help_text,
        epilog=example_text(*examples),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


class Format(StrEnum):
    """The formats of `-o`."""

    json = "json"


_FormatOption = Annotated[
    Format | None, typer.Option("--output", "-o", help="Output format; `-o json` is the same as --json.")
]


def _with_output_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `-o json` to a command that has `--json`."""
    if "as_json" not in inspect.signature(function).parameters:
        return function

    @functools.wraps(function)
    def run(*args: Any, **given: Any) -> Any:
        given["as_json"] |= given.pop("output_format") is not None
        if given["as_json"] and given.get("quiet"):
            raise typer.BadParameter("--quiet can't be combined with JSON output.")
        return function(*args, **given)

    added = inspect.Parameter("output_format", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_FormatOption)
    set_parameters(run, [*parameters_of(function), added])
    return run


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a command with their annotations as objects."""
    hints = get_type_hints(function, include_extras=True)
    given = inspect.signature(function).parameters
    return [parameter.replace(annotation=hints.get(name, parameter.annotation)) for name, parameter in given.items()]


def set_parameters(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> None:
    """Set the signature and the annotations of a command, which Typer reads."""
    command = cast("Any", function)
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def client() -> Lorry:
    """Return a client of the service that `lorry.connection.find` finds; it is closed when the command ends."""
    from lorry.client import Lorry

    return _closed_at_the_end.get().enter_context(Lorry())


def run(app: typer.Typer) -> None:
    """Run the command line. A bug in lorry is one sentence too, unless LORRY_TRACEBACK is set."""
    try:
        app(prog_name="lorry")
    except Exception as error:
        if os.environ.get("LORRY_TRACEBACK"):
            raise
        output.echo(f"Error: unexpected error ({type(error).__name__}: {error}). This is a bug in lorry.")
        output.echo("Run the command again with LORRY_TRACEBACK=1 and report the output.")
        raise SystemExit(EXIT_REFUSED) from None


def _simplified(message: str) -> str:
    """Replace the parser's message for a value that is not a number; it is meant for programmers."""
    message = re.sub(r"Input should be a valid number\b.*", "that is not a number.", message)
    return re.sub(r"Input should be a valid integer\b.*", "that is not a whole number.", message)


def _bad_lines(message: str) -> list[str]:
    """Split the message of a rejected file into one sentence for each bad line (`Line 7: …`).

    Any other message is one item.
    """
    if not message.startswith("Line "):
        return [message]
    return re.split(r" (?=Line \d+: |Reading stopped at )", message)


def _print_error(error: Any) -> None:
    from lorry.errors import APIError

    param = error.param if isinstance(error, APIError) else None
    is_named = param is not None and (param if param.startswith("--") else f"'{param}'") in error.message
    is_typed = param is not None and (param.startswith("--") or param.isupper())  # else a field of the HTTP API
    place = f" (at {param})" if is_typed and not is_named else ""
    lines = _bad_lines(error.message.removesuffix(error.remedy).rstrip())
    if len(lines) > 1:
        output.echo("\n".join((f"Error{place}:", *(f"  {line}" for line in lines), error.remedy)).rstrip())
    else:
        output.echo(f"Error: {error.message}{place}")
        if error.remedy and error.remedy not in error.message:
            output.echo(error.remedy)
    if isinstance(error, APIError) and error.doc_url:
        output.echo(f"More: {error.doc_url}")
