"""Reference answers: what the built-in engine answers to the probe prompt. A trainer answers, as to a client."""

from __future__ import annotations

import asyncio

from starlette.concurrency import run_in_threadpool

from api.inference.answer import PartialAnswer
from api.inference.exchange import EngineRequest, Engines
from catalog.db.database import Database
from catalog.errors import InvalidRequest
from catalog.inference import requests
from catalog.inference.requests import AnswerFailed
from catalog.serving import probes
from catalog.serving.probes import ProbeAnswer, ProbeKind
from catalog.tables.table import Json

NO_TEMPLATE = "base_has_no_chat_template"


class ReferenceAnswers:
    def __init__(self, db: Database, engines: Engines) -> None:
        self._db, self._engines = db, engines

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
        request = EngineRequest(
            project_id=project_id,
            model=model,
            parameters={**probes.probe_body(kind), "model": name},
            gone=asyncio.Event(),
        )
        answer, events = PartialAnswer(), list[Json]()
        async with self._engines.answering(request, answer, only_built_in=True) as deltas:
            async for delta in deltas:
                events += delta.logprobs
        try:
            found = ProbeAnswer(prompt_tokens=answer.prompt_tokens, tokens=probes.tokens_of(events))
            return probes.as_row(kind, found, generation=answer.generation)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AnswerFailed("invalid_reference") from error
