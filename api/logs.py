"""What the api's process says on stderr, with whatever looks like a secret taken out of it."""

from __future__ import annotations

import logging
import re
import sys

SECRETS = re.compile(
    r"(lorry_key-[0-9a-f]+_)[\w-]+|((?:token|api_key|secret|authorization)\W{1,4}(?:bearer )?)[\w.-]{8,}", re.I
)


class Redacted(logging.Formatter):
    """The last thing that happens to a line, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact(text: str) -> str:
    return SECRETS.sub(lambda found: f"{found[1] or found[2]}…", text)


def configure(level: str) -> None:
    """One handler, for us and for uvicorn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacted("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
