"""How every group of commands is built: errors become a sentence and an exit code, never a traceback."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lorry.cli.render import output

if TYPE_CHECKING:
    from lorry.client import Lorry

EXIT_REFUSED = 1
EXIT_USAGE = 2
EXIT_NOT_CHECKED = 3
EXIT_INTERRUPTED = 130
ALIKE = (
    ("remove", "delete", "revoke", "archive", "cancel", "rm"),
    ("create", "add", "new"),
    ("show", "get"),
    ("list", "ls"),
    ("change", "update", "rename"),
)
"""Of commands that do the same to different things, a group has one."""
_closed_at_the_end: ContextVar[ExitStack] = ContextVar("closed_at_the_end")


class CommandGroup(TyperGroup):
    """Runs a command and says what went wrong on stderr. For a command that another group has, it names its own."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        typed = args[0]
        if typed not in self.commands and not ctx.resilient_parsing:
            for own in (word for words in ALIKE if typed in words for word in words if word in self.commands):
                ctx.fail(f"No such command {typed!r}. Did you mean {own!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        from lorry.errors import LorryError

        try:
            with ExitStack() as stack:
                _closed_at_the_end.set(stack)
                return super().invoke(ctx)
        except LorryError as error:
            _say_error(error)
            raise typer.Exit(EXIT_REFUSED) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            output.say(f"Error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
            raise typer.Exit(EXIT_REFUSED) from None


class Sectioned(TyperCommand):
    """A command whose help lays out its options by their `rich_help_panel`; those without one come last.

    An option of one value may be given once: of two values none is the right one.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        parser: Any = self.make_parser(ctx)
        _, _, order = parser.parse_args(args=list(args))
        for param in dict.fromkeys(order):
            takes_one = param.param_type_name == "option" and not param.multiple and not param.is_flag
            if takes_one and order.count(param) > 1:
                ctx.fail(f"{param.opts[0]} is given {order.count(param)} times. Say it once.")
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = _in_plain_words(error.message)
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
            with formatter.section(title):
                formatter.write_dl(records)


def _in_plain_words(message: str) -> str:
    """Of a value that is no number: what the parser says of it is for programmers."""
    message = re.sub(r"Input should be a valid number\b.*", "that is not a number.", message)
    return re.sub(r"Input should be a valid integer\b.*", "that is not a whole number.", message)


def group(help_text: str) -> typer.Typer:
    """A Typer app in the house's way."""
    return typer.Typer(
        cls=CommandGroup, help=help_text, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
    )


def client() -> Lorry:
    """Of the service that the environment or the connection file names; closed when the command ends."""
    from lorry.client import Lorry

    return _closed_at_the_end.get().enter_context(Lorry())


def run(app: typer.Typer) -> None:
    """The entry point's last net: our own mistake is one sentence too, unless LORRY_TRACEBACK is set."""
    try:
        app(prog_name="lorry")
    except Exception as error:
        if os.environ.get("LORRY_TRACEBACK"):
            raise
        output.say(f"Error: lorry made a mistake ({type(error).__name__}: {error}).")
        output.say("Run it again with LORRY_TRACEBACK=1 and report what it prints.")
        raise SystemExit(EXIT_REFUSED) from None


def _bad_lines(message: str) -> list[str]:
    """A refused file's message begins a sentence with `Line 7: ` for each of its bad lines: those, each by itself.

    Any other message is one.
    """
    if not message.startswith("Line "):
        return [message]
    return re.split(r" (?=Line \d+: |Reading stopped at )", message)


def _say_error(error: Any) -> None:
    from lorry.errors import APIError

    param = error.param if isinstance(error, APIError) else None
    is_named = param is not None and (param if param.startswith("--") else f"'{param}'") in error.message
    place = f" (at {param})" if param and not is_named else ""
    lines = _bad_lines(error.message.removesuffix(error.remedy).rstrip())
    if len(lines) > 1:
        return output.say("\n".join((f"Error{place}:", *(f"  {line}" for line in lines), error.remedy)).rstrip())
    output.say(f"Error: {error.message}{place}")
    if error.remedy and error.remedy not in error.message:
        output.say(error.remedy)
    return None
