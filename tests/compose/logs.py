"""Finds tracebacks and lines of another format in the logs of the containers."""

from __future__ import annotations

import json
from collections.abc import Iterable

FIELDS = {"time", "level", "logger", "message"}


def problems(lines: Iterable[str]) -> list[str]:
    """Return the lines that contain a traceback, or are not log lines of LORRY_LOG_FORMAT=json."""
    return [line for line in lines if line.strip() and not _is_fine(line)]


def _is_fine(line: str) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and entry.keys() >= FIELDS and "Traceback" not in line
