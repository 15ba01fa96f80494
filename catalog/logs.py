"""What the api and the workers say on stderr, with whatever looks like a secret taken out of it."""

from __future__ import annotations

import logging
import re
import sys

SECRETS = re.compile(
    r"(lorry_key-[0-9a-f]+_)[\w-]+"
    r"|(whsec_)[\w+/=-]+"
    r"|((?:token|api_key|secret|authorization|pepper)\W{1,4}(?:bearer )?)[\w.-]{8,}"
    r"|(://[^\s:/@]*:)[^\s/@]+(?=@)",  # the password in the address of a database or a broker
    re.I,
)


class Redacted(logging.Formatter):
    """The last thing that happens to a line, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact(text: str) -> str:
    return SECRETS.sub(lambda found: f"{found[1] or found[2] or found[3] or found[4]}…", text)


def redact_handlers(logger: logging.Logger) -> None:
    """Of a library that has set up its own."""
    for handler in logger.handlers:
        told = handler.formatter
        handler.setFormatter(Redacted(told._fmt if told else None))


def configure(level: str) -> None:
    """One handler, for us and for the libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacted("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # It would tell each address, and a webhook's may hold a secret.
    logging.getLogger("httpx").setLevel(logging.WARNING)
