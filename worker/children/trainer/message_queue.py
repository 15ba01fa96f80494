"""The messages of the worker that a trainer has yet to handle."""

from __future__ import annotations

from lora_core.distributed.ranks import Ranks
from worker.protocol.mailbox import InboxReader, TrainerMessage


class MessageQueue:
    """Takes messages from the inbox, and keeps those that begin answers until inference has its turn.

    The leader decides, and all ranks get the same messages.
    """

    def __init__(self, inbox: InboxReader, ranks: Ranks) -> None:
        self._inbox = inbox
        self._ranks = ranks
        self._answers: list[TrainerMessage] = []
        """On the leader: `answer` messages that are not handled yet, in their order."""

    def take(self, *, num_answers: int | None) -> list[TrainerMessage]:
        """Return the messages to handle now, on every rank.

        num_answers: maximum number of `answer` messages if jobs train. None: without a limit, because no job trains. A
        job in the same messages counts as one that trains.
        """
        messages = self._due(num_answers) if self._ranks.leads else []
        sent = self._ranks.broadcast([[message.verb, message.body] for message in messages])
        return [TrainerMessage(verb=verb, body=body) for verb, body in sent]

    def _due(self, num_answers: int | None) -> list[TrainerMessage]:
        messages = [*self._answers, *self._inbox.take()]
        if num_answers is None:
            num_answers = 1 if any(message.verb == "admit" for message in messages) else len(messages)
        stopped = {message.body["claim_id"] for message in messages if message.verb == "stop_answering"}
        due: list[TrainerMessage] = []
        self._answers = []
        for message in messages:
            if message.verb != "answer":
                due.append(message)
            elif message.body["claim_id"] not in stopped:
                (due if num_answers > 0 else self._answers).append(message)
                num_answers -= 1
        return due
