"""Reference answers: what the built-in engine answers to the probe prompt. A worker answers, as to a client."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial

from starlette.concurrency import run_in_threadpool

from api.inference.answer import PartialAnswer, deltas_of
from api.inference.replies import Replies
from catalog.db.database import Database
from catalog.errors import InvalidRequest
from catalog.inference import requests
from catalog.inference.requests import AnswerFailed
from catalog.queue.notifier import Notifier
from catalog.serving import probes
from catalog.serving.probes import ProbeAnswer, ProbeKind
from catalog.tables.table import Json

NO_TEMPLATE = "base_has_no_chat_template"


class ReferenceAnswers:
    def __init__(self, db: Database, replies: Replies, notifier: Notifier) -> None:
        self._db, self._replies, self._notifier = db, replies, notifier

    async def of_base(self, name: str, *, project_id: str) -> Json:
        """Return the answer of a base model: to a chat or, without a chat template, to a text. Raises LorryError."""
        try:
            return await self.of(name, "chat", project_id=project_id)
        except InvalidRequest as error:
            if error.code != NO_TEMPLATE:
                raise
        return await self.of(name, "text", project_id=project_id)

    async def of(self, name: str, kind: ProbeKind, *, project_id: str) -> Json:
        """Return the answer of a model. It is not counted as usage. Raises LorryError."""
        model = await run_in_threadpool(requests.resolve, self._db, project_id=project_id, name=name)
        submit = partial(
            requests.submit,
            self._db,
            project_id=project_id,
            model=model,
            body={**probes.probe_body(kind), "model": name},
            reply_to=self._replies.address,
        )
        row = await run_in_threadpool(submit)
        reply, answer, events = self._replies.open(row.id), PartialAnswer(), list[Json]()
        reply.is_submitted = True
        try:
            self._notifier.wake_workers()
            why = partial(requests.why_unanswered, self._db, row.id)
            async with aclosing(deltas_of(reply, answer, gone=asyncio.Event(), why_unanswered=why)) as deltas:
                async for delta in deltas:
                    events += delta.logprobs
        finally:
            reply.close()
            finish = run_in_threadpool(requests.finish, self._db, row.id, prompt_tokens=0, completion_tokens=0)
            await asyncio.shield(finish)
        try:
            found = ProbeAnswer(prompt_tokens=answer.prompt_tokens, tokens=probes.tokens_of(events))
            return probes.as_row(kind, found, generation=answer.generation)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AnswerFailed(
                "The worker returned an unusable reference answer, so this endpoint can't be verified.",
                code="invalid_reference",
                remedy="Ask an operator to check the worker's log, and to restart the worker.",
            ) from error
