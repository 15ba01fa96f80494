"""Output of commands: results on stdout (text, ids or JSON), messages and errors on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from datetime import UTC, datetime
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from lorry.view import View

_WIDTH_OF_A_PIPE = 10_000
WAITING_SECONDS = 30.0
"""Interval of the lines about a wait without a terminal."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only IDs, one per line.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Skip the confirmation prompt.")]
YesAccepted = Annotated[bool, typer.Option("--yes", "-y", hidden=True, help="Has no effect.")]
"""For a command that can be undone and never asks: a script may pass --yes to every command that stops something."""


class Unattended(typer.BadParameter):
    """Wrong usage: a confirmation without a terminal. Only its message is printed, without a parameter."""

    def format_message(self) -> str:
        return self.message


def console() -> Console:
    """Return the console for results. Without a terminal, lines are not wrapped. Text is never markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)


def messages() -> Console:
    """Return the console for messages, progress and errors."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, markup=False, emoji=False)


@contextmanager
def waiting(what: str) -> Generator[Callable[[object], None]]:
    """Show that something takes time: a spinner on a terminal, else a line with the elapsed time twice a minute.

    Yields a function to call at each poll.
    """
    console, started = messages(), time.monotonic()
    if console.is_terminal:
        with console.status(clean(what)):
            yield lambda _: None
        return
    echo(f"{what}…")
    num_lines = 0

    def report(_: object) -> None:
        nonlocal num_lines
        elapsed = time.monotonic() - started
        if elapsed >= (num_lines + 1) * WAITING_SECONDS:
            num_lines += 1
            echo(f"{what}… {elapsed:.0f} s")

    yield report


def echo(message: str) -> None:
    """Print a message on stderr."""
    messages().print(clean(message), soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_json_line(value: Any) -> None:
    """Print one object per line, for output that continues over time."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def print_ids(ids: Iterable[str]) -> None:
    for one in ids:
        console().print(clean(one), soft_wrap=True)


def print_result(found: View, sentence: str, *, as_json: bool) -> None:
    if as_json:
        print_json(found.raw)
    else:
        echo(sentence)


def print_facts(found: View, facts: Iterable[tuple[str, object]], *, as_json: bool) -> None:
    """Print an object as JSON or as pairs. The facts are only read if they are printed."""
    if as_json:
        print_json(found.raw)
    else:
        pairs(facts)


def print_deleted(kind: str, name: str, *, as_json: bool, note: str = "") -> None:
    if as_json:
        print_json({"id": name, "deleted": True})
    else:
        echo(f"Deleted {kind} {name}.{note}")


def confirm(question: str, *, yes: bool) -> None:
    """Ask the user to confirm, unless `yes`. Exits if the answer is no, or if there is no terminal to ask at."""
    if yes:
        return
    if not is_interactive():
        raise Unattended("Confirmation required. Pass --yes to run non-interactively.")
    messages().print(f"{clean(question)} [y/N] ", end="", soft_wrap=True)
    try:
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        echo("")  # the cursor is behind the question
        raise
    if answer.strip().lower() not in {"y", "yes"}:
        echo("Aborted.")
        raise typer.Exit(1)


def is_interactive() -> bool:
    """Whether a user can answer."""
    return sys.stdin.isatty()


def is_watched() -> bool:
    """Whether a user sees the messages as they are printed."""
    return sys.stderr.isatty()


def pairs(values: Iterable[tuple[str, object]], *, label_width: int = 0) -> None:
    """Print a label and a value per line; None and empty texts are skipped.

    In a narrow terminal, values wrap below themselves. label_width: minimum width of the labels, in cells.
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
    """Print the title of a section of pairs."""
    from rich.text import Text

    console().print(Text(f"\n{clean(title).upper()}", style="bold"))


def brief(text: str) -> str:
    """Return the first line, cut between words if it is long."""
    return shorten(text.strip().partition("\n")[0], 160, placeholder=" …")


def clean(text: str) -> str:
    """Remove control characters, so that a message of the service can't control the terminal."""
    return "".join(c if c in "\n\t" or (c.isprintable() or c == "\u00a0") else "\ufffd" for c in text)


def when(timestamp: int | None) -> str | None:
    """Local time of a Unix time."""
    return None if timestamp is None else f"{datetime.fromtimestamp(timestamp, UTC).astimezone():%Y-%m-%d %H:%M:%S}"


def briefly(timestamp: int | None) -> str | None:
    """Local time of a Unix time, for a table: `11-24 16:39`; for another year, only the date."""
    if timestamp is None:
        return None
    local = datetime.fromtimestamp(timestamp, UTC).astimezone()
    return f"{local:%m-%d %H:%M}" if local.year == datetime.now().astimezone().year else f"{local:%Y-%m-%d}"


def recent(timestamp: int | None) -> str | None:
    """Local time of a Unix time; for today with seconds: `16:39:05`."""
    if timestamp is None:
        return None
    local = datetime.fromtimestamp(timestamp, UTC).astimezone()
    return f"{local:%H:%M:%S}" if local.date() == datetime.now().astimezone().date() else briefly(timestamp)


def short(digest: str | None) -> str | None:
    """Return the first 12 digits of a digest."""
    return digest[:12] if digest else None


def size(num_bytes: float) -> str:
    """Return three digits and a decimal unit, as in the dashboard: 812 B, 31.5 kB, 1.23 GB."""
    unit, rest = "B", float(num_bytes)
    for larger in ("kB", "MB", "GB", "TB"):
        if rest < 999.5:
            break
        unit, rest = larger, rest / 1000
    return f"{rest:.{0 if unit == 'B' or rest >= 99.95 else 1 if rest >= 9.995 else 2}f} {unit}"


def duration(seconds: float | None) -> str:
    """1:02:03, 2:03, or - if unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration_in_words(seconds: int) -> str:
    """Return a duration in its largest whole unit, such as 90 seconds, 15 minutes, 12 hours or 1 day."""
    units = {"day": 86_400, "hour": 3600, "minute": 60}
    unit, length = next(((u, n) for u, n in units.items() if seconds and seconds % n == 0), ("second", 1))
    count = seconds // length
    return f"{count} {unit}{'' if count == 1 else 's'}"


def cell(value: object) -> str:
    """Return a value as text for a user."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
