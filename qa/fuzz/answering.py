"""Workers without trainers: they load each base model that is wanted, and answer every request with the same text."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from catalog.db.database import Database
from catalog.fleet import workers
from catalog.inference import engines
from catalog.settings import Settings
from tests.api.fake_trainer import FakeTrainer, Json, begun
from tests.api.fake_trainer import ended as answered

WORKER = "answering"
POLL_SECONDS = 0.02
BEAT_POLLS = 500
"""Number of polls between two heartbeats."""
TOKEN: dict[str, Any] = {"token": "Yes", "logprob": -0.5, "bytes": [89, 101, 115]}


@contextmanager
def answering(db: Database, settings: Settings) -> Generator[None]:
    """Answer requests during the block."""
    _register(db, WORKER)
    ended = threading.Event()
    thread = threading.Thread(target=_run, args=(db, settings, ended), name=WORKER)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _run(db: Database, settings: Settings, ended: threading.Event) -> None:
    trainers: list[FakeTrainer] = []
    num_polls = 0
    with ExitStack() as stack:
        while not ended.wait(POLL_SECONDS):
            if num_polls % BEAT_POLLS == 0:
                workers.worker_beat(db, WORKER, resident_base=None, trainer_id=None, report=None)
                for trainer in trainers:
                    trainer.beat()
            num_polls += 1
            for base in engines.wanted(db, worker_id=WORKER):
                worker_id = f"{WORKER}-{len(trainers)}"
                _register(db, worker_id)
                loaded: dict[str, Any] = {"digest": base.base_digest, "key": base.pack_key}
                trainer = FakeTrainer(db, settings, script=_answer, worker_id=worker_id, **loaded)
                trainer.start()
                stack.callback(trainer.close)
                trainer.announce()
                trainers.append(trainer)


def _register(db: Database, worker_id: str) -> None:
    devices = [{"kind": "cpu", "quantizations": []}]
    about: dict[str, Any] = {"host": "here", "pid": 1, "devices": devices, "version": "1", "integrations": ()}
    workers.register_worker(db, worker_id=worker_id, memory_bytes=10**12, **about)


def _answer(request: Json) -> Iterator[Json]:
    num_choices = request["n"] * len(request.get("prompts", [""]))
    num_logprobs = request["num_logprobs"]
    token = {**TOKEN, "top_logprobs": [TOKEN] * (num_logprobs or 0)}
    added: Json = {} if num_logprobs is None else {"logprobs": [token]}
    choice: Json = {"text": "Yes", "finish": "stop", "num_tokens": 1, **added}
    yield begun(1)
    yield {"type": "generated", "deltas": [{"index": index, **choice} for index in range(num_choices)]}
    yield answered(num_choices)
