"""Edge cases of parsing server-sent events."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.errors import ConnectionFailed
from lorry.transport import sse
from lorry.transport.sse import ServerEvent

LONG = (
    b'\xef\xbb\xbfevent: job\r\nid: 7\r\ndata: {"a":\r\ndata: "\xe2\x80\xa8\xc3\xa9"}\r\n\r\n'
    b": ping\n\ndata:x\r\rid: 9\n\n"
)
PARSED = [
    ServerEvent(event="job", data='{"a":\n"\u2028é"}', id="7"),
    ServerEvent(event="message", data="x", id="7"),
]


URL = "http://127.0.0.1:8472/v1/queue/stream"


def events(*chunks: bytes) -> list[ServerEvent]:
    return list(sse.parse(chunks, url=URL))


def test_only_cr_lf_and_crlf_end_a_line() -> None:
    assert events(LONG) == PARSED


@given(st.lists(st.integers(0, len(LONG)), max_size=20))
def test_parsing_does_not_depend_on_chunk_boundaries(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(LONG)]

    assert events(*(LONG[a:b] for a, b in itertools.pairwise(edges))) == PARSED


def test_parsing_works_byte_by_byte() -> None:
    assert events(*(LONG[i : i + 1] for i in range(len(LONG)))) == PARSED


def test_unterminated_event_is_dropped() -> None:
    assert events(b"data: whole\n\ndata: half\n") == [ServerEvent(event="message", data="whole", id="")]


def test_id_persists_until_changed_or_cleared() -> None:
    assert [e.id for e in events(b"id: 1\ndata: a\n\ndata: b\n\nid\ndata: c\n\nid: 2\0\ndata: d\n\n")] == [
        "1",
        "1",
        "",
        "",
    ]


def test_comments_retry_and_unknown_fields_are_skipped() -> None:
    assert events(b": c\nretry: 9\nfoo: bar\ndata\n\n") == [ServerEvent(event="message", data="", id="")]


def test_only_one_space_after_the_colon_is_removed() -> None:
    assert events(b"data:  x \n\n")[0].data == " x "


def test_invalid_utf8_does_not_end_the_stream() -> None:
    assert events(b"data: \xff\n\n")[0].data == "\ufffd"


def test_endless_line_is_rejected_before_it_fills_memory() -> None:
    with pytest.raises(ConnectionFailed, match=f"{URL} returned an event stream with a line of more than"):
        list(sse.parse((b"x" * 2**20 for _ in range(10**6)), url=URL))
