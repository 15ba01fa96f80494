"""What a trainer prints of an error with which it goes on. Each line is marked, so that nobody who looks for why the
trainer ended later takes it for that."""

from __future__ import annotations

import re
import sys
import traceback

MARK = "handled| "
MARKED = re.compile(rf"^(?:\[rank\d+\]: )?{re.escape(MARK)}.*\n?", re.MULTILINE)


def print_handled(error: BaseException) -> None:
    """Its traceback, to the process's log."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    sys.stderr.write("".join(f"{MARK}{line}\n" for line in lines))
    sys.stderr.flush()


def without_handled(log: str) -> str:
    return MARKED.sub("", log)
