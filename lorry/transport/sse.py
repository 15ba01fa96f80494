"""Server-sent events, as the WHATWG HTML standard section 9.2 parses them.

Works on bytes: only CR, LF and CRLF end a line there, so a U+2028 inside of a JSON string must not.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lorry.errors import ConnectionFailed

MAX_EVENT_CHARS = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerEvent:
    """One dispatched event. `id` is the last id seen so far, as the standard has it."""

    event: str
    data: str
    id: str


def parse(chunks: Iterable[bytes]) -> Iterator[ServerEvent]:
    """Events from the pieces of a body. An event without its closing blank line is dropped, as it should be."""
    name, data, last_id = "", list[str](), ""
    for line in lines(chunks):
        if line == "":
            if data:
                yield ServerEvent(event=name or "message", data="\n".join(data), id=last_id)
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id" and "\0" not in value:
            last_id = value


def lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines without their ends; a CRLF cut in two by a chunk's edge is one end. The unended last line is dropped."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    buffered, at_start, after_cr = "", True, False
    for chunk in chunks:
        text = decoder.decode(chunk)
        if at_start and text:
            text, at_start = text.removeprefix("\ufeff"), False
        if after_cr and text:
            text, after_cr = text.removeprefix("\n"), False
        after_cr = after_cr or text.endswith("\r")
        *ended, buffered = (buffered + text.replace("\r\n", "\n").replace("\r", "\n")).split("\n")
        yield from ended
        if len(buffered) > MAX_EVENT_CHARS:
            raise ConnectionFailed(
                "A line of the event stream is too long.",
                code="bad_stream",
                remedy="Check that LORRY_URL names Lorry itself, and no other service before it.",
            )
