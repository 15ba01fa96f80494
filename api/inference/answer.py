"""The answer to one request, as it grows, and the errors that end it early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from catalog.error_texts import ErrorText
from catalog.errors import InvalidRequest, LorryError
from catalog.inference.engines import INTERRUPTED
from catalog.inference.requests import AnswerFailed
from catalog.serving.endpoints import BUILT_IN

MAX_KEPT_BYTES = 2**23
"""Maximum size of what is kept of one answer until it is complete: its text, and its log-probabilities."""
CLIENT_ERRORS = frozenset(
    {"context_length_exceeded", "invalid_config", "template_without_tools",
     "base_has_no_chat_template", "unusable_chat_template"}
)  # fmt: skip
"""Codes of a trainer's errors that the request causes."""
WORKER_ERRORS = frozenset({"disk_error", "out_of_memory", "out_of_space", INTERRUPTED})
"""Codes of errors of one worker. Another one may answer the same request."""
Json = dict[str, Any]


class ClientGone(Exception):
    """The client has disconnected."""


class AnswerInterrupted(LorryError):
    """The answer has not been completed. The same request can be answered if it is sent again."""

    status = 503
    type = "server_error"


@dataclass(kw_only=True, slots=True)
class Delta:
    """The addition of one chunk to one choice. logprobs: in the format of chats."""

    index: int
    text: str
    logprobs: list[Json]
    finish: str | None


@dataclass(kw_only=True, slots=True)
class PartialAnswer:
    """The answer so far."""

    engine: str = BUILT_IN
    """The engine that answers: BUILT_IN, or the name of a serving endpoint. Final when the answer has begun."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """An interrupted answer is charged, too."""
    has_begun: bool = False
    generation: Json | None = None
    """How the worker renders prompts and ends answers; see catalog/serving/probes.py."""
    _num_kept_bytes: int = 0

    def keep(self, num_bytes: int, *, of: Literal["text", "logprobs"] = "text") -> None:
        """Count what is kept until the answer is complete. Raises InvalidRequest beyond MAX_KEPT_BYTES."""
        self._num_kept_bytes += num_bytes
        if self._num_kept_bytes <= MAX_KEPT_BYTES:
            return
        raise InvalidRequest(
            "text_answer_too_large" if of == "text" else "chat_answer_too_large",
            max_kept_bytes=MAX_KEPT_BYTES / 2**20,
            param="max_tokens" if of == "text" else "logprobs",
        )


def failure(error: Json, *, prompt: str) -> LorryError:
    """Return a worker's error for the client. prompt: the parameter that errors of the prompt name."""
    text = ErrorText(code=str(error["code"]), message=str(error["message"]), remedy=str(error["remedy"]))
    if text.code in CLIENT_ERRORS:
        return InvalidRequest(text, param="tools" if text.code == "template_without_tools" else prompt)
    return AnswerInterrupted(text) if text.code in WORKER_ERRORS else AnswerFailed(text)
