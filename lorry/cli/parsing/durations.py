"""Options that take a length of time, such as 90s, 15m, 12h or 30d."""

from __future__ import annotations

import re
from typing import Any

import typer

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> int:
    """Return the seconds of 90s, 15m, 12h or 30d."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a duration. Use a number and a unit: 90s, 15m, 12h or 30d.")
    return int(found[1]) * UNITS[found[2]]


def duration(help_text: str, *names: str) -> Any:
    """Return an option that takes a length of time."""
    return typer.Option(*names, help=help_text, parser=seconds, metavar="<duration>")
