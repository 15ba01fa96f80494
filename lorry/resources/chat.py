"""Answers of models. The `openai` client offers more parameters: pass it `{lorry.url}/v1` and `lorry.api_key`."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, cast

from lorry.errors import APIError, ConnectionFailed
from lorry.resources.resource import Resource, given
from lorry.transport import sse
from lorry.transport.http import Transport

ANSWER_SECONDS = 660.0
"""The service answers within 600 seconds, or reports why not. A worker may have to load the base model first."""
END = "[DONE]"
_ENGINE = "x-lorry-engine"


class AnswerStream(Iterator[str]):
    """The pieces of an answer, in order. The request is sent when the first piece is read.

    engine: None until the answer has begun; then `built-in`, or the name of the serving endpoint that answers.
    """

    def __init__(self, transport: Transport, path: str, body: Mapping[str, Any]) -> None:
        self.engine: str | None = None
        self._pieces = self._read(transport, path, body)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop the answer."""
        self._pieces.close()

    def _read(self, transport: Transport, path: str, body: Mapping[str, Any]) -> Generator[str]:
        headers = {"accept": "text/event-stream"}
        with transport.stream(path, body=body, headers=headers, read_seconds=ANSWER_SECONDS) as response:
            self.engine = response.headers.get(_ENGINE)
            for event in sse.parse(response.iter_bytes(), url=str(response.url)):
                if event.data == END:
                    return
                chunk = cast("dict[str, Any]", json.loads(event.data))
                if error := chunk.get("error"):
                    raise APIError(error["message"], code=error["code"], remedy="", status=response.status_code)
                for choice in chunk["choices"]:
                    if text := choice["delta"].get("content") if "delta" in choice else choice["text"]:
                        yield text
        raise ConnectionFailed("answer_stream_ended")


class Chat(Resource):
    def stream(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> AnswerStream:
        """Return the answer of a base model, adapter or checkpoint to a conversation, in pieces of text.

        Once it has begun, its `engine` is `built-in`, or the name of the serving endpoint that answers.

        messages: as in OpenAI's API. None leaves a parameter to the service. Reading a piece raises APIError.
        """
        parameters = {"max_completion_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return self._answer("chat/completions", {"model": model, "messages": list(messages), **parameters})

    def complete(
        self,
        model: str,
        prompt: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> AnswerStream:
        """Return the model's continuation of a text, without a chat template. Otherwise like `stream`.

        max_tokens: default 16.
        """
        parameters = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return self._answer("completions", {"model": model, "prompt": prompt, **parameters})

    def _answer(self, path: str, parameters: Mapping[str, Any]) -> AnswerStream:
        return AnswerStream(self._transport, path, given(**parameters, stream=True))
