"""Answers of models. The `openai` client offers more parameters: pass it `{lorry.url}/v1` and `lorry.api_key`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from lorry.errors import APIError, ConnectionFailed
from lorry.transport import sse
from lorry.transport.http import Transport

ANSWER_SECONDS = 660.0
"""The service answers within 600 seconds, or reports why not. A worker may have to load the base model first."""
END = "[DONE]"


class Chat:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def stream(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yield the answer of a base model, adapter or checkpoint to a conversation, in pieces of text.

        messages: as in OpenAI's API. None leaves a parameter to the service. Raises APIError.
        """
        parameters = {"max_completion_tokens": max_tokens, "temperature": temperature, "seed": seed}
        given = {name: value for name, value in parameters.items() if value is not None}
        body = {"model": model, "messages": list(messages), "stream": True, **given}
        headers = {"accept": "text/event-stream"}
        path = "chat/completions"
        with self._transport.stream(path, body=body, headers=headers, read_seconds=ANSWER_SECONDS) as response:
            for event in sse.parse(response.iter_bytes(), url=str(response.url)):
                if event.data == END:
                    return
                chunk = cast("dict[str, Any]", json.loads(event.data))
                if error := chunk.get("error"):
                    raise APIError(error["message"], code=error["code"], remedy="", status=response.status_code)
                for choice in chunk["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text
        raise ConnectionFailed(
            "The service ended the answer early.", code="connection_failed", remedy="Send the request again."
        )
