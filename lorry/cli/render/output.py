"""How commands speak: results on stdout (text, or JSON with --json), messages and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_A_PIPE = 10_000

AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout.")]

YesTaken = Annotated[bool, typer.Option("--yes", "-y", hidden=True, help="Taken; there is no question.")]
"""Of a command that acts at once: a script may say --yes to whatever deletes or ends something."""


class Unattended(typer.BadParameter):
    """Wrong usage: a question that nobody can answer. Its message is all that is printed, without a parameter."""

    def format_message(self) -> str:
        return self.message


def console() -> Console:
    """For results: as wide as they are where no person's terminal cuts them. Text is never markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)


def messages() -> Console:
    """For messages, progress and errors."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, markup=False, emoji=False)


def say(message: str) -> None:
    messages().print(clean(message), soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_json_line(value: Any) -> None:
    """One object per line, for what goes on over time."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def confirm(question: str, *, yes: bool) -> None:
    """Goes on where a person says so, or --yes did. Else it exits: a script that forgot --yes with wrong usage."""
    if yes:
        return
    if not is_attended():
        raise Unattended("Say --yes: nobody is there to be asked.")
    messages().print(f"{clean(question)} [y/N] ", end="", soft_wrap=True)
    try:
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        say("")  # the cursor stands behind the question
        raise
    if answer.strip().lower() not in {"y", "yes"}:
        say("Nothing was done.")
        raise typer.Exit(1)


def is_attended() -> bool:
    """A person can answer."""
    return sys.stdin.isatty()


def pairs(values: Iterable[tuple[str, object]], *, label_width: int = 0) -> None:
    """Label and value, one a line; a None and an empty text are left out.

    Where a terminal is too narrow, values fold under themselves. label_width: cells that labels take at least.
    """
    from rich.table import Table
    from rich.text import Text

    shown = [(clean(label), clean(cell(value))) for label, value in values if value not in (None, "")]
    out = console()
    if not sys.stdout.isatty():  # a table would pad every line to the longest
        width = max((label_width, *(len(label) for label, _ in shown)))
        for label, value in shown:
            out.print(Text(f"{label:{width}}  {value}".replace("\n", f"\n{'':{width}}  ")), soft_wrap=True)
        return
    drawn = Table(box=None, show_header=False, pad_edge=False)
    drawn.add_column(style="bold", min_width=label_width)
    drawn.add_column(overflow="fold")
    for label, value in shown:
        drawn.add_row(label, Text(value))
    out.print(drawn)


def heading(title: str) -> None:
    """Of a section of pairs."""
    from rich.text import Text

    console().print(Text(f"\n{clean(title).upper()}", style="bold"))


def brief(text: str) -> str:
    """The first line, cut between words where it is long."""
    return shorten(text.strip().partition("\n")[0], 160, placeholder=" …")


def clean(text: str) -> str:
    """Without control characters, so that a message of the service can't steer the terminal."""
    return "".join(c if c in "\n\t" or (c.isprintable() or c == "\u00a0") else "\ufffd" for c in text)


def when(timestamp: int | None) -> str | None:
    """Local time of a Unix time."""
    return None if timestamp is None else f"{datetime.fromtimestamp(timestamp, UTC).astimezone():%Y-%m-%d %H:%M:%S}"


def briefly(timestamp: int | None) -> str | None:
    """Local time of a Unix time, for a table: `11-24 16:39`; of another year, the date alone."""
    if timestamp is None:
        return None
    told = datetime.fromtimestamp(timestamp, UTC).astimezone()
    return f"{told:%m-%d %H:%M}" if told.year == datetime.now().astimezone().year else f"{told:%Y-%m-%d}"


def lately(timestamp: int | None) -> str | None:
    """The same of what matters by the second while it is fresh: of today, `16:39:05`."""
    if timestamp is None:
        return None
    told = datetime.fromtimestamp(timestamp, UTC).astimezone()
    return f"{told:%H:%M:%S}" if told.date() == datetime.now().astimezone().date() else briefly(timestamp)


def short(digest: str | None) -> str | None:
    """Enough of a digest to tell it from the others."""
    return digest[:12] if digest else None


def size(num_bytes: float) -> str:
    """Three digits and a decimal unit, as the dashboard has it: 812 B, 31.5 kB, 1.23 GB."""
    unit, rest = "B", float(num_bytes)
    for larger in ("kB", "MB", "GB", "TB"):
        if rest < 999.5:
            break
        unit, rest = larger, rest / 1000
    return f"{rest:.{0 if unit == 'B' or rest >= 99.95 else 1 if rest >= 9.995 else 2}f} {unit}"


def duration(seconds: float | None) -> str:
    """1:02:03, 2:03, or - where it is not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def cell(value: object) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
