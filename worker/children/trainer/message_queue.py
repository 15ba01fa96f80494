"""Holds the messages of the worker that a trainer has yet to handle."""

from __future__ import annotations

from typing import cast

from lora_core.distributed.ranks import Ranks
from worker.children.trainer.inference import prompt_chars
from worker.protocol.answer_pipes import TrainerPipes
from worker.protocol.mailbox import AnswerBody, InboxReader, TrainerMessage

ANSWER_CHARS = 20_000
"""Characters of prompts that are encoded between two ticks or passes, in some hundredths of a second. At least one
prompt is."""


class MessageQueue:
    """Takes messages from the inbox and the pipe, and keeps those that begin answers until inference has its turn.

    The leader decides, and all ranks get the same messages.
    """

    def __init__(self, inbox: InboxReader, pipes: TrainerPipes | None, ranks: Ranks) -> None:
        """pipes: None on ranks that do not lead."""
        self._inbox = inbox
        self._pipes = pipes
        self._ranks = ranks
        self._answers: list[TrainerMessage] = []
        """On the leader: `answer` messages that are not handled yet, in their order."""

    def take(self, *, answer_chars: float) -> list[TrainerMessage]:
        """Return the messages to handle now, on every rank.

        answer_chars: `answer` messages are due until their prompts have this many characters together. Infinite: no job
        trains. A job in the same messages counts as one that trains.
        """
        messages = self._due(answer_chars) if self._ranks.leads else []
        sent = self._ranks.broadcast([[message.verb, message.body] for message in messages])
        return [TrainerMessage(verb=verb, body=body) for verb, body in sent]

    def _due(self, answer_chars: float) -> list[TrainerMessage]:
        assert self._pipes is not None
        messages = [*self._answers, *self._inbox.take(), *self._pipes.take()]
        if any(message.verb == "admit" for message in messages):
            answer_chars = min(answer_chars, ANSWER_CHARS)
        stopped = {message.body["request_id"] for message in messages if message.verb == "stop_answering"}
        due: list[TrainerMessage] = []
        self._answers = []
        for message in messages:
            if message.verb != "answer":
                due.append(message)
            elif message.body["request_id"] not in stopped:
                (due if answer_chars > 0 else self._answers).append(message)
                answer_chars -= max(1, prompt_chars(cast(AnswerBody, message.body)))
        return due
