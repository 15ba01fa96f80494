"""A worker's inference server, whose trainer is replaced by a script of each test.

The HTTP is that of real workers (worker/inference/server.py). Only the events of the trainer are invented.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from catalog.db.database import Database
from catalog.fleet import workers
from catalog.resources.pack_key import pack_key
from catalog.settings import Settings
from tests.catalog.world import sha
from worker.inference.server import InferenceServer
from worker.inference.session import InferenceSession, OpenAnswer

Json = dict[str, Any]
Step = Json | threading.Event
"""An event of a trainer, or what it waits for until then."""
DIGEST = sha("smol")
KEY = pack_key(DIGEST, "bfloat16")
PROMPT_TOKENS = 2


def begun(prompt_tokens: int = PROMPT_TOKENS, **generation: Any) -> Json:
    return {"type": "answering", "prompt_tokens": prompt_tokens, "generation": generation}


def said(text: str, number: int = 1, **fields: Any) -> Json:
    """Return an addition to the first choice. number: tokens of the choice so far."""
    return {"type": "generated", "deltas": [{"index": 0, "text": text, "num_tokens": number, **fields}]}


def ended(completion_tokens: int) -> Json:
    return {"type": "answered", "completion_tokens": completion_tokens}


def failed(code: str, message: str = "It is wrong.") -> Json:
    error = {"code": code, "message": message, "remedy": "Do better."}
    return {"type": "unanswered", "error": error}


def texts(*pieces: str) -> list[Json]:
    """Return the events of a whole answer."""
    *most, last = (said(piece, number) for number, piece in enumerate(pieces, 1))
    last["deltas"][0]["finish"] = "stop"
    return [begun(), *most, last, ended(len(pieces))]


LOST: Json = {"type": "lost"}
"""The connection ends, as when the worker is killed."""


class FakeTrainer:
    """A worker with a loaded trainer, and the trainer's row. By default it answers with the last prompt in capital
    letters. Tests change its attributes, or give a script."""

    def __init__(
        self,
        db: Database,
        settings: Settings,
        *,
        script: Callable[[Json], Iterable[Step]] | None = None,
        worker_id: str = "w1",
        digest: str = DIGEST,
        key: str = KEY,
    ) -> None:
        """script: returns the steps that answer a request, given the trainer's message `answer`. digest, key: of the
        loaded base model."""
        self.secret = f"secret of {worker_id}"
        self.accepts = True
        """False: it is about to be unloaded."""
        self.requests: list[Json] = []
        """The trainer's messages of all requests, with `adapter` and `tenant`."""
        self.stopped: list[str] = []
        """Prompts of the requests whose API server has disconnected before their end."""
        self.trainer_id = f"trainer-{worker_id}"
        self._script = script
        self._db, self._worker_id, self._digest, self._key = db, worker_id, digest, key
        self._open: dict[int, asyncio.Task[None]] = {}
        self._server = InferenceServer(settings)

    @property
    def prompts(self) -> list[str]:
        return [prompt_of(request) for request in self.requests]

    def start(self) -> None:
        """Serve. The worker is registered."""
        self._server.start()
        self._server.open(cast(InferenceSession, self))

    def announce(self) -> None:
        """Report the loaded trainer to the database."""
        worker_id, trainer_id, digest = self._worker_id, self.trainer_id, self._digest
        workers.register_trainer(
            self._db, trainer_id=trainer_id, worker_id=worker_id, base_digest=digest, pack_key=self._key
        )
        self.beat()
        workers.report_trainer(self._db, trainer_id, report={}, address=self._server.address, secret=self.secret)

    def beat(self) -> None:
        digest, trainer_id = self._digest, self.trainer_id
        workers.worker_beat(self._db, self._worker_id, resident_base=digest, trainer_id=trainer_id, report={})

    def close(self) -> None:
        """End, as if the worker was killed."""
        self._server.close()

    def steps(self, request: Json) -> Iterator[Step]:
        if self._script is not None:
            yield from self._script(request)
        else:
            yield from texts(prompt_of(request).upper())

    # As InferenceSession, for the server

    def begin(self, body: Json, *, adapter: str | None, tenant: str, is_batch: bool) -> OpenAnswer:
        request = {**body, "adapter": adapter, "tenant": tenant, "is_batch": is_batch}
        self.requests.append(request)
        answer = OpenAnswer(body=body, adapter=adapter, tenant=tenant, is_batch=is_batch)
        self._open[id(answer)] = asyncio.get_running_loop().create_task(self._play(answer, request))
        return answer

    def stop(self, answer: OpenAnswer) -> None:
        task = self._open.pop(id(answer))
        if not task.done():
            self.stopped.append(prompt_of(answer.body))
            task.cancel()

    async def _play(self, answer: OpenAnswer, request: Json) -> None:
        for step in self.steps(request):
            if isinstance(step, threading.Event):
                while not step.is_set():
                    await asyncio.sleep(0.01)
            elif step is LOST:
                answer.abandon()
            else:
                answer.put(step)
            await asyncio.sleep(0)


def prompt_of(request: Json) -> str:
    return request["prompts"][0] if "prompts" in request else request["messages"][-1]["content"]


@contextmanager
def serving(trainer: FakeTrainer) -> Iterator[FakeTrainer]:
    trainer.start()
    trainer.announce()
    try:
        yield trainer
    finally:
        trainer.close()
