"""Parses server-sent events (WHATWG HTML, section 9.2).

It works on bytes, because only CR, LF and CRLF end a line: a U+2028 in a JSON string must not.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lorry.errors import ConnectionFailed

MAX_EVENT_CHARS = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerEvent:
    """One event. `id` is the last id seen so far, as the standard requires."""

    event: str
    data: str
    id: str


def parse(chunks: Iterable[bytes], *, url: str) -> Iterator[ServerEvent]:
    """Yield the events of the body that `url` returned. As the standard requires, an event without its final blank line
    is dropped."""
    name, data, last_id = "", list[str](), ""
    for line in lines(chunks, url=url):
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


def lines(chunks: Iterable[bytes], *, url: str) -> Iterator[str]:
    """Yield lines without line ends. A CRLF split across chunks is one line end. An incomplete last line is dropped."""
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
            raise ConnectionFailed("bad_stream", url=url, max_event_chars=MAX_EVENT_CHARS)
