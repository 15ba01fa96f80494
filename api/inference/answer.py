"""Collects the answer to one request from the events of its worker, and survives the loss of that worker.

Another worker then answers from the beginning. The same seed gives the same text on the same kind of machine, so what
the client has already received is skipped. If the text differs, the request fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from api.inference.replies import Event, Reply, TooSlow
from catalog.errors import InvalidRequest, LorryError
from catalog.inference.requests import MAX_SECONDS, NoWorker

SILENT_SECONDS = 600.0
"""How long a worker that has begun to answer may send nothing. A request may wait for others in the trainer."""
CLIENT_ERRORS = frozenset(
    {"context_length_exceeded", "invalid_config", "template_refused_row", "template_without_tools",
     "base_has_no_chat_template", "unusable_chat_template"}
)  # fmt: skip
"""Codes of a trainer's errors that the request causes."""


class ClientGone(Exception):
    """The client has disconnected."""


@dataclass(kw_only=True, slots=True)
class Delta:
    """The addition of one event to one choice."""

    index: int
    text: str
    logprobs: list[Event]
    finish: str | None


@dataclass(kw_only=True, slots=True)
class _Received:
    text: str = ""
    num_logprobs: int = 0
    replayed: str = ""
    """The text of the current worker, while it repeats what another one has sent."""
    num_replayed: int = 0
    finish: str | None = None


@dataclass(kw_only=True, slots=True)
class PartialAnswer:
    """The answer so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    has_begun: bool = False
    _choices: dict[int, _Received] = field(default_factory=dict[int, _Received])

    def restart(self) -> None:
        self.has_begun = False
        for choice in self._choices.values():
            choice.replayed, choice.num_replayed = "", 0

    def count(self, event: Event) -> None:
        """Count the tokens that the event reports. An interrupted answer is charged, too."""
        self.completion_tokens = max(self.completion_tokens, int(event.get("completion_tokens", 0)))

    def add(self, delta: Event) -> Delta | None:
        """Return what is new in a delta. Raises NoWorker if it contradicts what was received before."""
        choice = self._choices.setdefault(int(delta["index"]), _Received())
        choice.replayed += str(delta["text"])
        logprobs: list[Event] = delta.get("logprobs") or []
        choice.num_replayed += len(logprobs)
        common = min(len(choice.text), len(choice.replayed))
        if choice.text[:common] != choice.replayed[:common]:
            raise NoWorker(
                "The worker that answered was lost, and another one gives a different answer.",
                code="answer_interrupted",
                remedy="Send the request again.",
            )
        new_text = choice.replayed[len(choice.text) :]
        num_new = max(0, choice.num_replayed - choice.num_logprobs)
        choice.text += new_text
        choice.num_logprobs += num_new
        finish = delta.get("finish") if choice.finish is None else None
        choice.finish = choice.finish or finish
        if not (new_text or num_new or finish):
            return None
        new_logprobs = logprobs[len(logprobs) - num_new :] if num_new else []
        return Delta(index=int(delta["index"]), text=new_text, logprobs=new_logprobs, finish=finish)


async def deltas_of(
    reply: Reply,
    answer: PartialAnswer,
    *,
    gone: asyncio.Event,
    why_unanswered: Callable[[], LorryError],
    wait_seconds: float | None = None,
) -> AsyncGenerator[Delta]:
    """Yield what each event adds, until the answer is complete.

    wait_seconds: how long the request may wait for a worker and for further events; None: MAX_SECONDS and
    SILENT_SECONDS. Raises LorryError if the request can't be answered, and ClientGone if the client is gone.
    """
    events = reply.events()
    loop = asyncio.get_running_loop()
    silent_seconds = SILENT_SECONDS if wait_seconds is None else wait_seconds
    wait_seconds = MAX_SECONDS if wait_seconds is None else wait_seconds
    expires_at = loop.time() + wait_seconds
    while True:
        seconds = silent_seconds if answer.has_begun else expires_at - loop.time()
        event = await _next(events, gone, seconds)
        if event is None:
            raise await asyncio.to_thread(why_unanswered) if not answer.has_begun else _silent()
        if event["type"] == "restarted":
            answer.restart()
            expires_at = loop.time() + wait_seconds
        elif event["type"] == "answering":
            answer.has_begun, answer.prompt_tokens = True, int(event["prompt_tokens"])
        elif event["type"] == "generated":
            answer.count(event)
            for given in event["deltas"]:
                delta = answer.add(given)
                if delta is not None:
                    yield delta
        elif event["type"] == "answered":
            answer.count(event)
            return
        elif event["type"] == "unanswered":
            raise _failure(event["error"])


async def _next(events: Any, gone: asyncio.Event, seconds: float) -> Event | None:
    """Return the next event, or None after `seconds`. Raises ClientGone."""
    following, leaving = asyncio.ensure_future(anext(events)), asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait((following, leaving), timeout=max(0, seconds), return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            return following.result()
        if leaving.done():
            raise ClientGone
        return None
    except TooSlow as error:
        raise NoWorker(
            "The client did not read the response, so the rest of the answer was discarded.",
            code="response_not_read",
            remedy="Read the stream without long pauses.",
        ) from error
    finally:
        for task in (following, leaving):
            task.cancel()


def _silent() -> NoWorker:
    return NoWorker(
        f"The worker has sent nothing for {SILENT_SECONDS:.0f} seconds.",
        code="answer_interrupted",
        remedy="Send the request again.",
    )


def _failure(error: Event) -> LorryError:
    """Return a trainer's error for the client."""
    code, message, remedy = str(error["code"]), str(error["message"]), str(error["remedy"])
    if code in CLIENT_ERRORS:
        param = "tools" if code == "template_without_tools" else "messages"
        return InvalidRequest(message, code=code, remedy=remedy, param=param)
    return NoWorker(message, code=code, remedy=remedy)
