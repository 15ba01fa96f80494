"""Logs to stderr from API servers, workers and trainers, with secrets redacted.

Lines are plain text by default. With LORRY_LOG_FORMAT=json, each line is a JSON object with the ids that apply to it:
request, API key, project, client address, job, claim, trainer, worker and trace. An outage repeats the same warnings
several times per second: each is logged once, and then every 30 seconds.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

from catalog import tracing

SECRETS = re.compile(
    r"(lorry_key-[0-9a-f]+_)[\w-]+"
    r"|(whsec_)[\w+/=-]+"
    r"|((?:token|api_key|secret|authorization|pepper)\W{1,4}(?:bearer )?)[\w.-]{8,}"
    r"|(://[^\s:/@]*:)[^\s/@]+(?=@)",  # the password in the address of a database or a broker
    re.I,
)
FORMAT = "LORRY_LOG_FORMAT"
REPEAT_SECONDS = 30.0
"""Minimum time between two equal warnings."""
TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
Subject = Literal["request", "job", "claim", "trainer", "worker", "trace", "key", "project", "address"]
"""Kinds of ids in log lines; `address` is the client's network address. A secret is never a subject."""
Subjects = Mapping[Subject, str | None]
_process: dict[Subject, str] = {}
"""Subjects of all lines of this process."""
_about: ContextVar[Subjects | None] = ContextVar("about", default=None)


class Redacted(logging.Formatter):
    """Redacts the finished line, including its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class RedactedJson(logging.Formatter):
    """Writes one JSON object per line. Each value is redacted before encoding: escaped quotes would hide secrets."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **subjects(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = self.formatStack(record.stack_info)
        return json.dumps({name: redact(text) for name, text in entry.items()}, ensure_ascii=False)


class Repetitions(logging.Filter):
    """Omits a warning that is equal to one of the last 30 seconds, with the same subjects and no traceback.

    It uses the lock of its handler, which logging renews in a forked process.
    """

    def __init__(self, handler: logging.Handler, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._handler, self._clock = handler, clock
        self._shown_at: dict[tuple[str, ...], float] = {}
        self._pruned_at = clock()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.exc_info:
            return True
        line = (record.name, record.getMessage(), *subjects().values())
        self._handler.acquire()
        try:
            return self._is_due(line)
        finally:
            self._handler.release()

    def _is_due(self, line: tuple[str, ...]) -> bool:
        now = self._clock()
        if now - self._shown_at.get(line, -math.inf) < REPEAT_SECONDS:
            return False
        self._shown_at[line] = now
        if now - self._pruned_at >= REPEAT_SECONDS:  # not at each line, because it visits all of them
            self._shown_at = {each: at for each, at in self._shown_at.items() if now - at < REPEAT_SECONDS}
            self._pruned_at = now
        return True


def redact(text: str) -> str:
    return SECRETS.sub(lambda found: f"{found[1] or found[2] or found[3] or found[4]}…", text)


def set_up_handlers(logger: logging.Logger) -> None:
    """Set up the handlers that a library has created itself, and keep the format of their text lines."""
    for handler in logger.handlers:
        formatter = handler.formatter
        handler.setFormatter(_formatter(formatter._fmt if formatter else None))
        handler.addFilter(Repetitions(handler))


def configure(level: str) -> None:
    """Set up one handler for Lorry and its libraries. Raises SystemExit if LORRY_LOG_FORMAT is not json or text."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(TEXT))
    handler.addFilter(Repetitions(handler))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # httpx logs each URL at INFO, and the URL of a webhook may contain a secret.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # A backup creates the tables of a dump with alembic, whose lines look as if it migrated the service's database.
    logging.getLogger("alembic").setLevel(logging.WARNING)


@contextmanager
def about(subjects: Subjects) -> Generator[None]:
    """Add subjects to the log lines of this block, in its thread and in threads that copy its context."""
    token = _about.set({**(_about.get() or {}), **subjects})
    try:
        yield
    finally:
        _about.reset(token)


@contextmanager
def all_about(subjects: Mapping[Subject, str]) -> Generator[None]:
    """Add subjects to the log lines of all threads of this process for the duration of the block."""
    _process.update(subjects)
    try:
        yield
    finally:
        for name in subjects:
            _process.pop(name, None)


def subjects() -> dict[str, str]:
    """Return the subjects of a line that is logged in the current context."""
    found: Subjects = {"trace": tracing.trace_id(tracing.current()), **_process, **(_about.get() or {})}
    return {name: text for name, text in found.items() if text is not None}


def _formatter(text: str | None) -> logging.Formatter:
    """text: format string of plain-text lines."""
    wanted = os.environ.get(FORMAT, "").strip().lower() or "text"
    if wanted == "json":
        return RedactedJson()
    if wanted != "text":
        raise SystemExit(f"{FORMAT} is {wanted!r}. Set it to json or text.")
    return Redacted(text)
