"""Files in the formats of OpenAI's fine-tuning guides are valid, and every part of their rows is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from catalog.datasets.chat import Chat, check_chat, is_supervised
from catalog.datasets.row_json import parse_object
from catalog.datasets.rows import check_pair
from catalog.datasets.validator import inspect

FOLDER = Path(__file__).parent / "openai_rows"


def chats(name: str) -> list[Chat]:
    return [check_chat(parse_object(line)) for line in (FOLDER / name).read_bytes().splitlines()]


@pytest.mark.parametrize(
    ("name", "kind", "num_rows"),
    [("chat.jsonl", "chat", 3), ("tool_calls.jsonl", "chat", 2), ("preference.jsonl", "preference", 2)],
)
def test_file_is_accepted(name: str, kind: str, num_rows: int) -> None:
    with (FOLDER / name).open("rb") as file:
        check = inspect(file, max_line_bytes=2**20, max_rows=100)

    assert (check.kind, check.num_rows) == (kind, num_rows)


def test_weights_of_a_chat_are_read() -> None:
    plain, short, weighted = chats("chat.jsonl")

    assert [message["role"] for message in plain.messages] == ["system", "user", "assistant"]
    assert [message["role"] for message in short.messages] == ["user", "assistant"]
    assert [message.get("weight") for message in weighted.messages] == [None, None, 0, None, 1]
    assert all(is_supervised(chat) for chat in (plain, short, weighted))


def test_single_and_parallel_tool_calls_are_read() -> None:
    single, parallel = chats("tool_calls.jsonl")

    def called(chat: Chat) -> list[tuple[str, object]]:
        calls = chat.messages[1].get("tool_calls", [])
        return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]

    weather = {"location": "Lima, Peru", "format": "celsius"}
    assert called(single) == [("get_current_weather", {"location": "Oslo, Norway", "format": "celsius"})]
    assert called(parallel) == [("get_current_weather", weather), ("get_time", {"location": "Lima, Peru"})]
    assert [len(chat.tools or ()) for chat in (single, parallel)] == [1, 2]
    assert [message["role"] for message in parallel.messages[2:]] == ["tool", "tool", "assistant"]


def test_preference_pairs_of_texts_and_tool_calls_are_read() -> None:
    text, calls = (check_pair(parse_object(line)) for line in (FOLDER / "preference.jsonl").read_bytes().splitlines())

    assert text["preferred"]["content"].startswith("In Oslo")
    assert text["rejected"]["content"] == "It is winter there."
    assert not text["prompt"].tools
    assert len(calls["prompt"].tools or ()) == 1
    (call,) = calls["preferred"].get("tool_calls", [])
    assert call["function"]["arguments"] == {"location": "Rome, Italy", "format": "celsius"}
    assert "tool_calls" not in calls["rejected"]
