"""The structural check of datasets: accepted files, and the errors of rejected ones."""

import io
import json
import resource
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.datasets.chat import check_chat
from catalog.datasets.formats import kind_of_row
from catalog.datasets.row_json import BadRow, parse_object
from catalog.datasets.rows import check_pair
from catalog.datasets.validator import DatasetCheck, inspect, read_rows
from catalog.errors import InvalidRequest

MIB = 2**20


def row(*, question: str = "What is 2 + 2?", answer: str = "4", **extra: Any) -> bytes:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]
    return json.dumps({"messages": messages}).encode() + b"\n"


def check(content: bytes, *, max_line_bytes: int = 8 * MIB, max_rows: int = 100_000) -> DatasetCheck:
    return inspect(io.BytesIO(content), max_line_bytes=max_line_bytes, max_rows=max_rows)


def refusal(content: bytes, **limits: int) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check(content, **limits)
    assert caught.value.param == "file"
    assert caught.value.remedy.endswith(".")
    return caught.value


def test_chat_rows_are_counted() -> None:
    assert check(row() * 3) == DatasetCheck(num_rows=3, kind="chat")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_mark_at_the_start_is_skipped(mark: bytes) -> None:
    line = row().rstrip()

    assert check(mark + line, max_line_bytes=len(line)).num_rows == 1
    assert list(read_rows(io.BytesIO(mark + line), max_line_bytes=MIB)) == [(1, line)]
    assert refusal(line + b"\n" + b"\xef\xbb\xbf" + line).code == "invalid_json"
    assert refusal(mark + line + b"x", max_line_bytes=len(line)).code == "invalid_row"


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n  \n"])
def test_any_line_ending_and_trailing_blank_lines_are_accepted(end: bytes) -> None:
    assert check(row() + row().rstrip() + end).num_rows == 2


def test_all_roles_weights_and_names_are_accepted() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": ""},
        {"role": "user", "content": "Grüße, 世界 😀", "name": "anna"},
        {"role": "assistant", "content": "thinking", "weight": 0},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "42", "weight": 1},
    ]

    assert check_chat(parse_object(json.dumps({"messages": messages}).encode())).messages == messages


WHOLE_FILES = {
    b"": "file_empty",
    b"\n\n \n": "file_empty",
    b'[{"messages": []}]': "invalid_row",
    b'{\n  "messages": []\n}\n': "invalid_row",
    b"prompt,completion\na,b\n": "invalid_row",
    b"PK\x03\x04rest": "invalid_row",
    b"\x1f\x8brest": "invalid_row",
    b"PAR1rest": "invalid_row",
    row().decode().encode("utf-16"): "invalid_row",
}


@pytest.mark.parametrize(("content", "code"), WHOLE_FILES.items(), ids=str)
def test_file_of_another_format_is_reported_once(content: bytes, code: str) -> None:
    problem = refusal(content)

    assert problem.code == code
    is_empty = code == "file_empty"
    assert problem.message.startswith("The file has no rows." if is_empty else "Line 1: ")
    assert problem.message.count("Line ") == (0 if is_empty else 1)


BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "truncated JSON": (b'{"messages": [', "invalid_json"),
    "plain text": (b"hello", "invalid_json"),
    "two objects": (b"{} {}", "invalid_json"),
    "a control character": (b'{"messages": [{"role": "user", "content": "\x01"}]}', "invalid_json"),
    "a NUL": (b"\x00", "invalid_json"),
    "bytes that are not UTF-8": (b'{"messages": "\xff"}', "invalid_row"),
    "half a surrogate pair": (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "invalid_row"),
    "half a surrogate pair in a key": (b'{"\\uDC00": 1}', "invalid_row"),
    "100,000 objects deep": (b'{"a":' * 100_000, "invalid_row"),
    "100,000 lists deep": (b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_row"),
    "65 levels deep": (b'{"messages":' + b"[" * 64 + b"]" * 64 + b"}", "invalid_row"),
    "64 levels deep": (b'{"messages":' + b"[" * 63 + b"]" * 63 + b"}", "invalid_row"),
    "65 levels with half a surrogate pair": (b'{"\\ud800":' + b"[" * 64 + b"]" * 64 + b"}", "invalid_row"),
    "NaN": (b'{"messages": NaN}', "invalid_row"),
    "minus infinity": (b'{"messages": -Infinity}', "invalid_row"),
    "1e999": (b'{"messages": 1e999}', "invalid_row"),
    "an integer of 100,000 digits": (b'{"messages": ' + b"9" * 100_000 + b"}", "invalid_row"),
    "a duplicate key": (b'{"messages": [], "messages": []}', "invalid_row"),
    "a nested duplicate key": (b'{"messages": [{"role": "user", "role": "tool"}]}', "invalid_row"),
    "a list": (b"[1]", "invalid_row"),
    "null": (b"null", "invalid_row"),
    "nothing": (b"{}", "invalid_row"),
    "a completion": (b'{"prompt": "a", "completion": "b"}', "invalid_row"),
    "a text": (b'{"text": "a"}', "invalid_row"),
    "an unknown key": (b'{"messages": [], "id": 1}', "invalid_row"),
    "messages as a string": (b'{"messages": "hi"}', "invalid_row"),
    "no message": (b'{"messages": []}', "invalid_row"),
    "a message as a string": (b'{"messages": ["hi"]}', "invalid_row"),
    "no role": (b'{"messages": [{"content": "hi"}]}', "invalid_row"),
    "an unknown role": (b'{"messages": [{"role": "bot", "content": "hi"}]}', "invalid_row"),
    "a role that is a list": (b'{"messages": [{"role": [], "content": "hi"}]}', "invalid_row"),
    "no content": (b'{"messages": [{"role": "user"}]}', "invalid_row"),
    "null content": (b'{"messages": [{"role": "assistant", "content": null}]}', "invalid_row"),
    "no part": (b'{"messages": [{"role": "user", "content": []}]}', "invalid_row"),
    "an image": (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "invalid_row"),
    "a part of two": (
        b'{"messages": [{"content": [{"type": "text", "text": "a", "x": 1}], "role": "user"}]}',
        "invalid_row",
    ),
    "a bare part": (b'{"messages": [{"role": "user", "content": ["a"]}]}', "invalid_row"),
    "a tool call": (b'{"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}', "invalid_row"),
    "a misspelled key": (b'{"messages": [{"role": "user", "content": "a", "wieght": 0}]}', "invalid_row"),
    "weight 0.5": (row(weight=0.5), "invalid_row"),
    "weight true": (row(weight=True), "invalid_row"),
    "a weight on a question": (b'{"messages": [{"role": "user", "content": "a", "weight": 1}]}', "invalid_row"),
    "a number as a name": (row(name=7), "invalid_value"),
    "no assistant": (b'{"messages": [{"role": "user", "content": "hi"}]}', "invalid_row"),
    "an empty answer": (row(answer=" \n"), "invalid_row"),
    "a blank line": (b"  ", "invalid_row"),
}


@pytest.mark.parametrize(("line", "code"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_line_is_reported_with_its_reason(line: bytes, code: str) -> None:
    problem = refusal(row() * 2 + line.rstrip(b"\n") + b"\n" + row())

    assert problem.code == code
    assert problem.message.startswith("Line 3: ")
    assert problem.message.count("Line ") == 1


def test_one_bad_line_in_ten_thousand_is_found() -> None:
    content = row() * 6_172 + b'{"messages": [}\n' + row() * 3_827

    problem = refusal(content)

    assert problem.message == "Line 6173: the JSON is invalid at column 15: expecting value."


def test_first_five_bad_lines_are_listed_and_reading_stops() -> None:
    problem = refusal((row() + b"{}\n") * 50)

    assert [line for line in range(1, 101) if f"Line {line}:" in problem.message] == [2, 4, 6, 8, 10]
    assert problem.message.endswith("Reading stopped at the 5th bad line; there may be more.")


def test_different_problems_have_their_own_remedies() -> None:
    problem = refusal(row() + b"{}\n" + b'{"messages": 1}\n' + row())

    assert problem.code == "invalid_row"
    assert problem.message == (
        'Line 2: the key "messages" is missing. Use {"messages": [...]}. '
        "Line 3: messages is a number, not a list. "
        'Use a list of messages, such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
    )
    assert problem.remedy == "Correct these lines, then upload the file again."


def test_remedy_shared_by_all_bad_lines_appears_once() -> None:
    problem = refusal(row() + b"{}\n" + row() + b"{}\n")

    assert problem.message == 'Line 2: the key "messages" is missing. Line 4: the key "messages" is missing.'
    assert problem.remedy == 'Use {"messages": [...]}.'


def test_blank_line_runs_are_reported_with_their_extent() -> None:
    assert refusal(row() + b"\n" + row()).message == "Line 2: the line is blank."
    problem = refusal(row() + b"\n \n\n" + row() + b"\n" + row())

    assert problem.code == "invalid_row"
    assert problem.message == "Line 2: lines 2 to 4 are blank. Line 6: the line is blank."
    assert problem.remedy == "Delete all blank lines before the last row."
    many = refusal((row() + b"\n\n") * 3 + b"{}\n")
    assert many.message.startswith(
        "Line 2: lines 2 to 3 are blank. Delete all blank lines before the last row. Line 5: "
    )


def test_file_with_only_masked_rows_is_rejected() -> None:
    problem = refusal(row(weight=0) * 3)

    assert problem.code == "nothing_to_learn"
    assert problem.message.startswith("Every assistant message with text or tool calls has weight 0")
    assert check(row(weight=0) + row()).num_rows == 2


def test_file_with_too_many_rows_is_rejected_at_the_first_excess_row() -> None:
    problem = refusal(row() * 4, max_rows=3)

    assert problem.code == "file_too_large"
    assert problem.message.startswith("Line 4: ")


def test_line_length_limit_is_exact() -> None:
    line = row().rstrip(b"\n")

    assert check(line + b"\r\n" + line, max_line_bytes=len(line)).num_rows == 2
    for tail in (b"", b"\n", b"\r\n"):
        problem = refusal(line + b"\n" + line + b"   " + tail, max_line_bytes=len(line))
        assert problem.code == "invalid_row"
        assert f"has {len(line) + 3:,} bytes, but the maximum is {len(line):,}." in problem.message


class Endless(io.RawIOBase):
    """A file that contains one line of 300 MB, generated while it is read."""

    def __init__(self, head: bytes, num_bytes: int, tail: bytes) -> None:
        self._parts = self._generate(head, num_bytes, tail)
        self._left = b""

    def _generate(self, head: bytes, num_bytes: int, tail: bytes) -> Iterator[bytes]:
        yield head
        for _ in range(num_bytes // MIB):
            yield b"a" * MIB
        yield tail

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or next(self._parts, b"")
        taken = self._left[: len(buffer)]
        buffer[: len(taken)] = taken
        self._left = self._left[len(taken) :]
        return len(taken)


def test_line_of_300_mb_is_rejected_in_bounded_memory() -> None:
    head = row() + b'{"messages": [{"role": "user", "content": "'
    file = io.BufferedReader(Endless(head, 300 * MIB, b'"}]}\n{}\n' + row()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(InvalidRequest) as caught:
        inspect(file, max_line_bytes=8 * MIB, max_rows=100)

    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert caught.value.code == "invalid_row"
    num_bytes = len(head) - len(row()) + 300 * MIB + len('"}]}')
    assert caught.value.message.startswith(
        f"Line 2: the line has {num_bytes:,} bytes, but the maximum is 8,388,608. Shorten the row"
    )
    assert " Line 3: " in caught.value.message
    assert grown_bytes < 64 * MIB


def test_read_rows_returns_line_numbers() -> None:
    assert [number for number, _ in read_rows(io.BytesIO(row() * 2 + b"\n"), max_line_bytes=MIB)] == [1, 2]
    with pytest.raises(InvalidRequest, match="Line 2"):
        list(read_rows(io.BytesIO(row() + b"\n" + row()), max_line_bytes=MIB))


def test_quoted_user_text_is_short_and_escaped() -> None:
    problem = refusal(json.dumps({"\u001b[31m" + "x" * 500: 1}).encode())

    assert "\u001b" not in problem.message
    assert len(problem.message) < 120


KEYS = st.sampled_from(["messages", "role", "content", "weight", "prompt", "completion", "text"]) | st.text()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_parsed_or_rejected(content: bytes) -> None:
    with suppress(BadRow):
        found = parse_object(content)
        assert kind_of_row(found, before=None).check(found)


def test_text_parts_of_content_are_joined() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]
    chat = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1], "weight": 1}]}
    pair = {
        "input": {"messages": [{"role": "user", "content": parts}]},
        "preferred_output": [{"role": "assistant", "content": [{"type": "text", "text": "2"}]}],
        "non_preferred_output": [{"role": "assistant", "content": "3"}],
    }

    assert [message["content"] for message in check_chat(chat).messages] == ["What is 1+1?", "What is "]
    checked = check_pair(pair)
    assert (checked["prompt"].messages[0]["content"], checked["preferred"]["content"]) == ("What is 1+1?", "2")


def content(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (content("a"), "content[0] is a string, not an object"),
        (content({"text": "a"}), "content[0].type is missing"),
        (content({"type": "text"}), "content[0].text is missing"),
        (content({"type": "text", "text": None}), "content[0].text is null, not a string"),
        (content({"type": "text", "text": "a", "id": 1}), "content[0] has an unknown key, 'id'"),
        (content({"type": "text", "text": "a"}, {"type": "image_url"}), "content[1].type is 'image_url', not 'text'"),
        ({"role": "user", "weight": 1}, "allowed only on assistant messages, but the message's role is 'user'"),
        ({"role": "assistant", "weight": 2}, "weight is 2, but must be 0 or 1"),
        ({"role": "assistant", "weight": True}, "weight is a boolean, but must be 0 or 1"),
        ({"role": "bot"}, "role is 'bot', which is not a valid role"),
        ({}, "role is missing"),
    ],
    ids=str,
)
def test_invalid_message_is_reported_with_the_field_and_its_value(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as raised:
        check_chat({"messages": [{"content": "a", **message}]})

    assert raised.value.reason.startswith("messages[0].")
    assert raised.value.reason.endswith(reason)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("1e999", "the number 1e999 is out of range"),
        ("1" * 45, f"the integer {'1' * 40}... has 45 digits, but the maximum is 19"),
        ('"\\ud83d"', r"\ud83d is half of a surrogate pair"),
    ],
)
def test_unusable_value_is_shown(value: str, reason: str) -> None:
    with pytest.raises(BadRow) as raised:
        parse_object(f'{{"text": {value}}}'.encode())

    assert raised.value.reason == reason


@pytest.mark.parametrize(("weight", "is_trained"), [(0, False), (0.0, False), (1, True), (1.0, True)])
def test_weight_of_a_message_may_be_written_with_a_fraction(weight: float, is_trained: bool) -> None:
    answers = [{"role": "assistant", "content": "a", "weight": weight}, {"role": "assistant", "content": "b"}]
    chat = check_chat({"messages": [{"role": "user", "content": "q"}, *answers]})

    assert bool(chat.messages[1].get("weight")) is is_trained
