"""A worker for tests of batches: it claims inference requests as a trainer does, and answers with the last prompt."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from catalog.db.database import Database, read_clock
from catalog.inference import claims
from catalog.inference.claims import InferenceClaim
from catalog.resources.pack_key import pack_key
from catalog.usage import report
from tests.catalog.world import LEASE, World, sha
from worker.session.reply_connections import ReplyConnections

KEY = pack_key(sha("smol"), "bfloat16")
CHAT_URL = "/v1/chat/completions"


def input_line(custom_id: str, text: str = "Hi", *, url: str = CHAT_URL, **body: Any) -> dict[str, Any]:
    """Return a valid request about `text`."""
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if url == CHAT_URL else {"prompt": text}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "smol", **prompt, **body}}


def jsonl(*rows: Any) -> bytes:
    """Return one line per row. Rows that are bytes are written unchanged."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


class BatchWorker:
    """Answers requests with their prompts in capital letters."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._stopping = threading.Event()
        self.gate = threading.Event()
        """While it is not set, nothing is claimed."""
        self.gate.set()
        self.error: Callable[[str], dict[str, Any] | None] = lambda _: None
        """Returns the error of a prompt, or None."""
        self.holds: Callable[[str], bool] = lambda _: False
        """Whether a request with this prompt is claimed, but never answered."""
        self.prompts: list[str] = []
        """The prompts of all claimed requests."""
        self._connections = ReplyConnections()

    def run(self) -> None:
        while not self._stopping.wait(0.01):
            if self.gate.is_set():
                for claim in claims.claim(self._db, worker_id="w1", pack_key=KEY, limit=100, lease_seconds=LEASE):
                    self._answer(claim)
        self._connections.close()

    def stop(self) -> None:
        self._stopping.set()

    def _answer(self, claim: InferenceClaim) -> None:
        prompt = claim.body["prompts"][0] if "prompts" in claim.body else claim.body["messages"][-1]["content"]
        self.prompts.append(prompt)
        if self.holds(prompt):
            return
        self._send(claim, {"type": "answering", "prompt_tokens": 2})
        if (error := self.error(prompt)) is not None:
            self._send(claim, {"type": "unanswered", "error": error})
            return
        delta = {"index": 0, "text": prompt.upper(), "finish": "stop"}
        self._send(claim, {"type": "generated", "deltas": [delta]})
        self._send(claim, {"type": "answered", "completion_tokens": 3})

    def _send(self, claim: InferenceClaim, event: dict[str, Any]) -> None:
        self._connections.send(claim.reply_to, request_id=claim.request_id, claim_id=claim.claim_id, event=event)


@contextmanager
def answering(db: Database) -> Iterator[BatchWorker]:
    worker = BatchWorker(db)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(20)


def used_tokens(db: Database, world: World) -> tuple[float, float, float]:
    with db.read() as session:
        query = report.UsageQuery(start_time=read_clock(session) - 86400, group_by=("project_id",))
    found = report.report(db, caller=world.caller, query=query)
    used = [used.amounts for day in found.days for used in day.used]
    names = ("num_completions", "prompt_tokens", "completion_tokens")
    first, second, third = (sum(amounts[name] for amounts in used) for name in names)
    return first, second, third
