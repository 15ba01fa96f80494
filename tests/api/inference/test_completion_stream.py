"""A streamed answer ends when the key of its request is revoked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.types import Message

from api.auth.authentication import Identity
from api.inference.answer import Delta, PartialAnswer
from api.inference.responses import ChatFormat, head_of
from api.routes import inference
from api.routes.inference import CompletionStream
from catalog.error_texts import ErrorText
from catalog.errors import Unauthorized, Unavailable

REVOKED = Unauthorized(ErrorText(code="revoked_api_key", message="The key was revoked.", remedy="Use another."))
UNKNOWN = Unavailable("database_unavailable")
WORDS = ("one ", "two ", "three")


class ThreeWords:
    """An answer of three chunks."""

    def __init__(self) -> None:
        head = head_of("chatcmpl", model="smol", base_digest="0" * 64)
        self.form = ChatFormat(head, tools=frozenset(), with_logprobs=False)

    @asynccontextmanager
    async def answering(self, answer: PartialAnswer) -> AsyncGenerator[AsyncGenerator[Delta]]:
        assert not answer.has_begun
        yield self._deltas()

    async def _deltas(self) -> AsyncGenerator[Delta]:
        for index, word in enumerate(WORDS, 1):
            yield Delta(index=0, text=word, logprobs=[], finish="stop" if index == len(WORDS) else None)


def streamed(results: list[Exception | None]) -> str:
    """Return what a client receives. results: of the checks of its key, in order."""
    sent: list[Message] = []

    def identify() -> Any:
        error = results.pop(0) if results else None
        if error is not None:
            raise error

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        await asyncio.Event().wait()
        return {}

    recheck = Identity(holder="key", identify=identify)
    answer: Any = ThreeWords()
    stream = CompletionStream(answer, n=1, with_usage=False, recheck=recheck)
    asyncio.run(stream({"type": "http"}, receive, send))
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert not sent[-1]["more_body"]
    return b"".join(message.get("body", b"") for message in sent).decode()


def test_answer_ends_with_an_error_when_the_key_is_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "RECHECK_SECONDS", 0.0)

    text = streamed([None, None, REVOKED])

    assert ("one " in text, "three" in text) == (True, False)
    assert "The key was revoked." in text
    assert "[DONE]" not in text


@pytest.mark.parametrize(("seconds", "results"), [(0.0, [UNKNOWN] * 9), (60.0, [REVOKED])])
def test_answer_continues_while_the_key_is_not_known_to_be_revoked(
    monkeypatch: pytest.MonkeyPatch, seconds: float, results: list[Exception | None]
) -> None:
    monkeypatch.setattr(inference, "RECHECK_SECONDS", seconds)

    text = streamed(results)

    assert all(word in text for word in WORDS)
    assert "[DONE]" in text
