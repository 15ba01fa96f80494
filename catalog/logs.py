"""What the api, the workers and their trainers say on stderr, with whatever looks like a secret taken out of it.

As text for people; by LORRY_LOG_FORMAT=json a line is an object that names what it is about: request, API key, project,
client address, job, claim, trainer, worker and trace, where there is one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Generator, Mapping
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
TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
Subject = Literal["request", "job", "claim", "trainer", "worker", "trace", "key", "project", "address"]
"""Each names an id, and `address` the client's network address. A secret is never a subject."""
Subjects = Mapping[Subject, str | None]
_process: dict[Subject, str] = {}
"""What every line of this process is about."""
_about: ContextVar[Subjects | None] = ContextVar("about", default=None)


class Redacted(logging.Formatter):
    """The last thing that happens to a line, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class RedactedJson(logging.Formatter):
    """One object a line. Each text in it is redacted by itself, for quotes that are escaped hide what is a secret."""

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


def redact(text: str) -> str:
    return SECRETS.sub(lambda found: f"{found[1] or found[2] or found[3] or found[4]}…", text)


def redact_handlers(logger: logging.Logger) -> None:
    """Of a library that has set up its own."""
    for handler in logger.handlers:
        formatter = handler.formatter
        handler.setFormatter(_formatter(formatter._fmt if formatter else None))


def configure(level: str) -> None:
    """One handler, for us and for the libraries. Ends the program where LORRY_LOG_FORMAT says something else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # It would tell each address, and a webhook's may hold a secret.
    logging.getLogger("httpx").setLevel(logging.WARNING)


@contextmanager
def about(subjects: Subjects) -> Generator[None]:
    """What the lines of this block are about, in its thread and in those that requests are handed to."""
    token = _about.set({**(_about.get() or {}), **subjects})
    try:
        yield
    finally:
        _about.reset(token)


@contextmanager
def all_about(subjects: Mapping[Subject, str]) -> Generator[None]:
    """What every line of this process is about meanwhile, whatever thread it is of."""
    _process.update(subjects)
    try:
        yield
    finally:
        for name in subjects:
            _process.pop(name, None)


def subjects() -> dict[str, str]:
    """What a line is about here and now."""
    found: Subjects = {"trace": tracing.trace_id(tracing.current()), **_process, **(_about.get() or {})}
    return {name: text for name, text in found.items() if text is not None}


def _formatter(text: str | None) -> logging.Formatter:
    """text: the form of a line that is for people."""
    wanted = os.environ.get(FORMAT, "").strip().lower() or "text"
    if wanted == "json":
        return RedactedJson()
    if wanted != "text":
        raise SystemExit(f"{FORMAT} is {wanted!r}. Set it to json, or to text.")
    return Redacted(text)
