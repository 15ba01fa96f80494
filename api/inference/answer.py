"""Collects the answer to one request from the events of its worker, and survives the loss of that worker.

Another worker then answers from the beginning. The same seed gives the same text on the same kind of machine, so what
the client has already received is skipped. If the text differs, the request fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Literal

from api.inference.replies import Event, Reply, TooSlow
from catalog.errors import InvalidRequest, LorryError
from catalog.inference.requests import AnswerFailed
from catalog.serving.endpoints import BUILT_IN
from catalog.tables.inference import MAX_SECONDS

MAX_KEPT_BYTES = 2**23
"""Maximum size of what is kept of one answer until it is complete: its text, to compare it with that of another worker,
and its log-probabilities unless they are streamed."""
SILENT_SECONDS = 600.0
"""How long a worker that has begun to answer may send nothing. A request may wait for others in the trainer."""
CLIENT_ERRORS = frozenset(
    {"context_length_exceeded", "invalid_config", "template_refused_row", "template_without_tools",
     "base_has_no_chat_template", "unusable_chat_template", "unprocessable_request"}
)  # fmt: skip
"""Codes of a trainer's errors that the request causes."""
WORKER_ERRORS = frozenset({"base_not_loaded", "disk_error", "out_of_memory", "out_of_space"})
"""Codes of errors of one worker. Another one may answer the same request."""


class ClientGone(Exception):
    """The client has disconnected."""


class AnswerInterrupted(LorryError):
    """The answer has not been completed. The same request can be answered if it is sent again."""

    status = 503
    type = "server_error"


@dataclass(kw_only=True, slots=True)
class Delta:
    """The addition of one event to one choice."""

    index: int
    text: str
    logprobs: list[Event]
    finish: str | None


@dataclass(kw_only=True, slots=True)
class _Received:
    """The part of one choice that the client has."""

    text: StringIO = field(default_factory=StringIO)
    num_logprobs: int = 0
    repeated: str = ""
    """The text that another worker must repeat, after this one was lost."""
    num_repeated: int = 0
    num_repeated_logprobs: int = 0
    """How much of the text and of the log-probabilities the current worker has sent."""
    finish: str | None = None

    def restart(self) -> None:
        self.repeated, self.num_repeated, self.num_repeated_logprobs = self.text.getvalue(), 0, 0

    def new_text(self, text: str, finish: str | None) -> str:
        """Return the part of the text that the client does not have. finish: of the current worker.

        Raises AnswerInterrupted if the answer differs from what the client has: in its text, or because it is shorter,
        or longer than a complete one.
        """
        known = self.repeated[self.num_repeated : self.num_repeated + len(text)]
        self.num_repeated += len(known)
        new = text[len(known) :]
        is_shorter = finish is not None and self.num_repeated < len(self.repeated)
        is_longer = self.finish is not None and bool(new)
        if not text.startswith(known) or is_shorter or is_longer:
            raise AnswerInterrupted(
                "The worker that answered was lost, and another one gives a different answer.",
                code="answer_interrupted",
                remedy="Send the request again.",
            )
        self.text.write(new)
        return new

    def new_logprobs(self, logprobs: list[Event]) -> list[Event]:
        self.num_repeated_logprobs += len(logprobs)
        num_new = max(0, self.num_repeated_logprobs - self.num_logprobs)
        self.num_logprobs += num_new
        return logprobs[len(logprobs) - num_new :]


@dataclass(kw_only=True, slots=True)
class PartialAnswer:
    """The answer so far."""

    engine: str = BUILT_IN
    """The engine that answers: BUILT_IN, or the name of a serving endpoint. Final when the answer has begun."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    has_begun: bool = False
    generation: Event | None = None
    """How the worker renders prompts and ends answers; see catalog/serving/probes.py."""
    _num_kept_bytes: int = 0
    _choices: dict[int, _Received] = field(default_factory=dict[int, _Received])

    def restart(self) -> None:
        self.has_begun = False
        for choice in self._choices.values():
            choice.restart()

    def count(self, event: Event) -> None:
        """Count the tokens that the event reports. An interrupted answer is charged, too."""
        self.completion_tokens = max(self.completion_tokens, int(event.get("completion_tokens", 0)))

    def keep(self, num_bytes: int, *, of: Literal["text", "logprobs"] = "text") -> None:
        """Count what is kept until the answer is complete. Raises InvalidRequest beyond MAX_KEPT_BYTES."""
        self._num_kept_bytes += num_bytes
        if self._num_kept_bytes <= MAX_KEPT_BYTES:
            return
        raise InvalidRequest(
            f"The answer was stopped, because it exceeds the limit of {MAX_KEPT_BYTES / 2**20:g} MiB.",
            code="answer_too_large",
            remedy="Reduce max_tokens, n or the number of prompts."
            if of == "text"
            else "Reduce max_tokens, n or the number of log-probabilities. Or set stream to true.",
            param="max_tokens" if of == "text" else "logprobs",
        )

    def added(self, event: Event) -> Iterator[Delta]:
        """Yield what an event of the type `generated` adds. Raises AnswerInterrupted if it contradicts an earlier one,
        and InvalidRequest if the answer is too large."""
        self.count(event)
        for given in event["deltas"]:
            delta = self._added(given)
            if delta is not None:
                yield delta

    def _added(self, given: Event) -> Delta | None:
        choice = self._choices.setdefault(int(given["index"]), _Received())
        finish: str | None = given.get("finish")
        text = choice.new_text(str(given["text"]), finish)
        self.keep(len(text))
        logprobs = choice.new_logprobs(given.get("logprobs") or [])
        finish = finish if choice.finish is None else None
        choice.finish = choice.finish or finish
        if not (text or logprobs or finish):
            return None
        return Delta(index=int(given["index"]), text=text, logprobs=logprobs, finish=finish)


async def deltas_of(
    reply: Reply,
    answer: PartialAnswer,
    *,
    gone: asyncio.Event,
    why_unanswered: Callable[[], LorryError],
    prompt: str = "messages",
    wait_seconds: float | None = None,
) -> AsyncGenerator[Delta]:
    """Yield what each event adds, until the answer is complete.

    prompt: the parameter that errors of the prompt name. wait_seconds: how long the request may wait for a worker and
    for further events; None: MAX_SECONDS and SILENT_SECONDS. Raises LorryError if the request can't be answered, and
    ClientGone if the client is gone.
    """
    loop = asyncio.get_running_loop()
    silent_seconds = SILENT_SECONDS if wait_seconds is None else wait_seconds
    wait_seconds = MAX_SECONDS if wait_seconds is None else wait_seconds
    expires_at = loop.time() + wait_seconds
    leaving = asyncio.ensure_future(gone.wait())
    try:
        while True:
            event = await _next(reply, leaving, silent_seconds if answer.has_begun else expires_at - loop.time())
            if event is None:
                raise await asyncio.to_thread(why_unanswered) if not answer.has_begun else _silent()
            if event["type"] == "restarted":
                answer.restart()
                expires_at = loop.time() + wait_seconds
            elif event["type"] == "answering":
                answer.has_begun, answer.prompt_tokens = True, int(event["prompt_tokens"])
                answer.generation = event.get("generation")
            elif event["type"] == "generated":
                for delta in answer.added(event):
                    yield delta
            elif event["type"] == "answered":
                answer.count(event)
                return
            elif event["type"] == "unanswered":
                raise _failure(event["error"], prompt)
    finally:
        leaving.cancel()


async def _next(reply: Reply, leaving: asyncio.Future[Any], seconds: float) -> Event | None:
    """Return the next event, or None after `seconds`. Raises ClientGone once `leaving` is done."""
    until = asyncio.get_running_loop().time() + seconds
    while not leaving.done():
        try:
            event = reply.take()
        except TooSlow as error:
            raise AnswerInterrupted(
                "The client did not read the response, so the rest of the answer was discarded.",
                code="response_not_read",
                remedy="Read the stream without long pauses.",
            ) from error
        seconds = until - asyncio.get_running_loop().time()
        if event is not None or seconds <= 0:
            return event
        await asyncio.wait((reply.changed(), leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    raise ClientGone


def _silent() -> AnswerInterrupted:
    return AnswerInterrupted(
        f"The worker has sent nothing for {SILENT_SECONDS:.0f} seconds.",
        code="answer_interrupted",
        remedy="Send the request again.",
    )


def _failure(error: Event, prompt: str) -> LorryError:
    """Return a trainer's error for the client."""
    code, message, remedy = str(error["code"]), str(error["message"]), str(error["remedy"])
    if code in CLIENT_ERRORS:
        param = "tools" if code == "template_without_tools" else prompt
        return InvalidRequest(message, code=code, remedy=remedy, param=param)
    kind = AnswerInterrupted if code in WORKER_ERRORS else AnswerFailed
    return kind(message, code=code, remedy=remedy)
