"""An answer is collected from its events. Repetitions of a second worker are skipped; a contradiction is an error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from api.inference import replies
from api.inference.answer import AnswerInterrupted, ClientGone, Delta, PartialAnswer, deltas_of
from api.inference.replies import Reply, TooSlow
from catalog.errors import InvalidRequest
from catalog.inference.requests import AnswerFailed, NoWorker

BEGUN = {"type": "answering", "prompt_tokens": 4}
ENDED = {"type": "answered", "completion_tokens": 3}
RESTARTED = {"type": "restarted"}


def generated(text: str, *, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"type": "generated", "deltas": [{"index": index, "text": text, **fields}]}


def token(text: str) -> dict[str, Any]:
    return {"token": text, "logprob": -1.0, "bytes": list(text.encode()), "top_logprobs": []}


def collect(events: Sequence[dict[str, Any]], *, is_gone: bool = False) -> tuple[PartialAnswer, list[Delta]]:
    async def run() -> tuple[PartialAnswer, list[Delta]]:
        reply, answer, gone = Reply("infer-1", lambda _: None), PartialAnswer(), asyncio.Event()
        for event in events:
            reply.put(event, 10)
        if is_gone:
            gone.set()
        found = deltas_of(reply, answer, gone=gone, why_unanswered=lambda: NoWorker("No.", code="c", remedy="r"))
        return answer, [delta async for delta in found]

    return asyncio.run(run())


def text_of(deltas: Sequence[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def test_answer_is_collected_until_it_is_complete() -> None:
    answer, deltas = collect([BEGUN, generated("a"), generated("b", index=1), generated("c", finish="stop"), ENDED])

    assert (text_of(deltas), text_of(deltas, 1)) == ("ac", "b")
    assert [delta.finish for delta in deltas] == [None, None, "stop"]
    assert (answer.prompt_tokens, answer.completion_tokens) == (4, 3)


def test_interrupted_answer_counts_the_tokens_that_were_generated() -> None:
    error = {"code": "inference_failed", "message": "No.", "remedy": "Retry."}
    events = [BEGUN, {**generated("a"), "completion_tokens": 5}, RESTARTED, BEGUN]
    events += [{**generated("a"), "completion_tokens": 2}, {"type": "unanswered", "error": error}]

    async def run() -> PartialAnswer:
        reply, answer = Reply("infer-1", lambda _: None), PartialAnswer()
        for event in events:
            reply.put(event, 10)
        found = deltas_of(reply, answer, gone=asyncio.Event(), why_unanswered=lambda: NoWorker("", code="c", remedy=""))
        with pytest.raises(AnswerFailed):
            [delta async for delta in found]
        return answer

    assert asyncio.run(run()).completion_tokens == 5


@pytest.mark.parametrize("pieces", [("ab", "cd", "ef"), ("abcdef",), ("a", "b", "c", "d", "e", "f"), ("abc", "def")])
def test_second_worker_repeats_what_the_client_has_and_continues(pieces: tuple[str, ...]) -> None:
    first = [BEGUN, generated("ab", logprobs=[token("a"), token("b")]), generated("c", logprobs=[token("c")])]
    again = [generated(piece, logprobs=[token(character) for character in piece]) for piece in pieces]

    _, deltas = collect([*first, RESTARTED, BEGUN, *again, generated("", finish="length"), ENDED])

    assert text_of(deltas) == "abcdef"
    assert [each["token"] for delta in deltas for each in delta.logprobs] == list("abcdef")
    assert [delta.finish for delta in deltas if delta.finish] == ["length"]


def test_choice_that_was_complete_is_not_completed_twice() -> None:
    first = [BEGUN, generated("ab", finish="stop"), generated("x", index=1)]

    _, deltas = collect(
        [*first, RESTARTED, BEGUN, generated("ab", finish="stop"), generated("xy", index=1, finish="stop"), ENDED]
    )

    assert (text_of(deltas), text_of(deltas, 1)) == ("ab", "xy")
    assert [(delta.index, delta.finish) for delta in deltas if delta.finish] == [(0, "stop"), (1, "stop")]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([generated("ab")], [generated("ax")]),
        ([generated("ab")], [generated("a", finish="stop")]),
        ([generated("ab")], [generated("a"), generated("", finish="length")]),
        ([generated("ab", finish="stop")], [generated("abc")]),
        ([generated("ab", finish="stop")], [generated("ab"), generated("c", finish="stop")]),
    ],
    ids=["other text", "shorter", "shorter in parts", "longer", "longer in parts"],
)
def test_second_worker_that_answers_differently_fails_the_request(
    first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> None:
    with pytest.raises(AnswerInterrupted) as raised:
        collect([BEGUN, *first, RESTARTED, BEGUN, *second, ENDED])

    assert raised.value.code == "answer_interrupted"


@pytest.mark.parametrize(
    ("code", "kind", "param"),
    [
        ("context_length_exceeded", InvalidRequest, "messages"),
        ("template_without_tools", InvalidRequest, "tools"),
        ("out_of_memory", AnswerInterrupted, None),
        ("logits_not_finite", AnswerFailed, None),
        ("disk_error", AnswerInterrupted, None),
    ],
)
def test_error_of_the_trainer_reaches_the_client(code: str, kind: type[Exception], param: str | None) -> None:
    error = {"code": code, "message": "It is wrong.", "remedy": "Do better."}

    with pytest.raises(kind, match="It is wrong") as raised:
        collect([{"type": "unanswered", "error": error}])

    assert getattr(raised.value, "param") == param  # noqa: B009  (pytest's type has no such attribute)


def test_client_that_is_gone_ends_the_waiting() -> None:
    with pytest.raises(ClientGone):
        collect([], is_gone=True)


def test_request_without_a_worker_fails_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.inference.answer.MAX_SECONDS", 0.05)

    with pytest.raises(NoWorker) as raised:
        collect([])

    assert raised.value.code == "c"


def test_worker_that_falls_silent_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.inference.answer.SILENT_SECONDS", 0.05)

    with pytest.raises(AnswerInterrupted, match="sent nothing"):
        collect([BEGUN])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list whose only item is the time."""
    now = [100.0]
    monkeypatch.setattr(replies, "monotonic", lambda: now[0])
    return now


@pytest.mark.usefixtures("clock")
def test_burst_is_no_fault_of_the_client() -> None:
    reply = Reply("infer-1", lambda _: None)
    for _ in range(12):
        reply.put(generated("a"), replies.MAX_PENDING_BYTES)

    assert [reply.take() for _ in range(13)] == [*[generated("a")] * 12, None]


@pytest.mark.parametrize("by", ["put", "take"])
def test_client_must_catch_up_in_time(clock: list[float], by: str) -> None:
    reply = Reply("infer-1", lambda _: None)
    for _ in range(5):  # each time, it catches up in time
        reply.put(generated("a"), replies.MAX_PENDING_BYTES + 1)
        clock[0] += replies.CATCH_UP_SECONDS - 1
        assert reply.take() is not None
    for _ in range(3):
        reply.put(generated("a"), replies.MAX_PENDING_BYTES)
    clock[0] += replies.CATCH_UP_SECONDS
    if by == "put":
        reply.put(generated("a"), 1)
        clock[0] = 0.0

    with pytest.raises(TooSlow):
        reply.take()


@pytest.mark.usefixtures("clock")
def test_size_of_a_burst_is_limited() -> None:
    closed: list[Reply] = []
    reply = Reply("infer-1", closed.append)
    for _ in range(17):
        reply.put(generated("a"), replies.MAX_BURST_BYTES // 16)

    assert closed == [reply]
    with pytest.raises(TooSlow):
        reply.take()


def test_text_that_is_kept_for_another_worker_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.inference.answer.MAX_KEPT_BYTES", 10)
    collect([BEGUN, *[generated("abcde", index=index) for index in range(2)], ENDED])

    with pytest.raises(InvalidRequest, match="was stopped") as raised:
        collect([BEGUN, *[generated("abcde", index=index) for index in range(3)], ENDED])

    assert (raised.value.code, raised.value.param) == ("answer_too_large", "max_tokens")


def test_text_is_repeated_by_each_worker_that_is_lost() -> None:
    lost = [RESTARTED, BEGUN, generated("a"), RESTARTED, BEGUN, generated("abc"), generated("d")]

    _, deltas = collect([BEGUN, generated("ab"), *lost, RESTARTED, BEGUN, generated("abcdef", finish="stop"), ENDED])

    assert text_of(deltas) == "abcdef"
