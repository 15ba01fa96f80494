"""Format of server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

COMMENT = b": still here\n\n"
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}


def message(event: str, data: str, *, ident: int | None = None) -> bytes:
    """Return a message. `data` is JSON, which contains no line breaks."""
    assert "\n" not in data
    assert "\r" not in data
    head = f"event: {event}\n" + ("" if ident is None else f"id: {ident}\n")
    return f"{head}data: {data}\n\n".encode()


def last_event_id(header: str | None) -> int | None:
    """Return the sequence number that the client saw last; None for a missing or malformed header."""
    return int(header) if header and header.isascii() and header.isdecimal() and len(header) < 19 else None
