"""A worker without a trainer: it answers every inference request with the same text."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from catalog.inference.claims import InferenceClaim
from worker.session.reply_connections import ReplyConnections

from catalog.db.database import Database
from catalog.fleet import workers
from catalog.inference import claims

WORKER = "answering"
POLL_SECONDS = 0.02
BEAT_POLLS = 500
"""Number of polls between two heartbeats."""
LEASE_SECONDS = 60.0
LIMIT = 100
TOKEN: dict[str, Any] = {"token": "Yes", "logprob": -0.5, "bytes": [89, 101, 115]}


@contextmanager
def answering(db: Database) -> Generator[None]:
    """Answer requests during the block."""
    devices = [{"kind": "cpu", "quantizations": []}]
    about: dict[str, Any] = {"host": "here", "pid": 1, "devices": devices, "version": "1", "integrations": ()}
    workers.register_worker(db, worker_id=WORKER, memory_bytes=10**12, **about)
    ended = threading.Event()
    thread = threading.Thread(target=_run, args=(db, ended), name=WORKER)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _run(db: Database, ended: threading.Event) -> None:
    connections, num_polls = ReplyConnections(), 0
    while not ended.wait(POLL_SECONDS):
        if num_polls % BEAT_POLLS == 0:
            workers.worker_beat(db, WORKER, resident_base=None, trainer_id=None, report=None)
        num_polls += 1
        for base in claims.unloaded(db, worker_id=WORKER):
            given: dict[str, Any] = {"pack_key": base.pack_key, "limit": LIMIT, "lease_seconds": LEASE_SECONDS}
            for claimed in claims.claim(db, worker_id=WORKER, **given):
                _answer(connections, claimed)
        connections.failed()
    connections.close()


def _answer(connections: ReplyConnections, claimed: InferenceClaim) -> None:
    body = claimed.body
    assert body is not None
    num_choices = body["n"] * len(body.get("prompts", [""]))
    num_logprobs = body["num_logprobs"]
    token = {**TOKEN, "top_logprobs": [TOKEN] * (num_logprobs or 0)}
    added = {} if num_logprobs is None else {"logprobs": [token]}
    said = [{"index": index, "text": "Yes", "finish": "stop", **added} for index in range(num_choices)]
    for event in (
        {"type": "answering", "prompt_tokens": 1},
        {"type": "generated", "deltas": said},
        {"type": "answered", "completion_tokens": num_choices},
    ):
        connections.send(claimed.reply_to, request_id=claimed.request_id, claim_id=claimed.claim_id, event=event)
