"""For tests of batches: a client, and a worker that claims inference requests as a trainer does, and answers with the
last prompt."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai

from catalog.db.database import Database, read_clock
from catalog.inference import claims
from catalog.inference.claims import InferenceClaim
from catalog.resources.pack_key import pack_key
from catalog.usage import report
from tests.api.site import Site, until
from tests.catalog.world import LEASE, World, sha
from worker.session.reply_connections import ReplyConnections

KEY = pack_key(sha("smol"), "bfloat16")
CHAT_URL = "/v1/chat/completions"
ENDED = {"completed", "failed", "cancelled", "expired"}


def input_line(custom_id: str, text: str = "Hi", *, url: str = CHAT_URL, **body: Any) -> dict[str, Any]:
    """Return a valid request about `text`."""
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if url == CHAT_URL else {"prompt": text}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "smol", **prompt, **body}}


def jsonl(*rows: Any) -> bytes:
    """Return one line per row. Rows that are bytes are written unchanged."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def strict_client(site: Site, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{site.url}/v1", api_key=key, max_retries=0, _strict_response_validation=True)


def create(client: openai.OpenAI, *rows: Any, endpoint: Any = CHAT_URL, **given: Any) -> openai.types.Batch:
    file = client.files.create(file=("requests.jsonl", jsonl(*rows)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **given)


def wait(client: openai.OpenAI, batch_id: str, statuses: set[str] = ENDED) -> openai.types.Batch:
    until(lambda: client.batches.retrieve(batch_id).status in statuses)
    return client.batches.retrieve(batch_id)


def rows_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [] if file_id is None else [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def counts(batch: openai.types.Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed)


def text_of(row: dict[str, Any]) -> str:
    return row["response"]["body"]["choices"][0]["message"]["content"]


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
        self.suspends: Callable[[str], bool] = lambda _: False
        """Whether the answer to this prompt begins, but ends only after `resuming` is set."""
        self.resuming = threading.Event()
        self._suspended: list[InferenceClaim] = []
        self.prompts: list[str] = []
        """The prompts of all claimed requests."""
        self._connections = ReplyConnections()

    def run(self) -> None:
        while not self._stopping.wait(0.01):
            if self.gate.is_set():
                for claim in claims.claim(self._db, worker_id="w1", pack_key=KEY, limit=100, lease_seconds=LEASE):
                    self._answer(claim)
            while self.resuming.is_set() and self._suspended:
                self._complete(self._suspended.pop(0))
        self._connections.close()

    def stop(self) -> None:
        self._stopping.set()

    def _answer(self, claim: InferenceClaim) -> None:
        prompt = _prompt(claim)
        self.prompts.append(prompt)
        if self.holds(prompt):
            return
        self._send(claim, {"type": "answering", "prompt_tokens": 2})
        if (error := self.error(prompt)) is not None:
            self._send(claim, {"type": "unanswered", "error": error})
            return
        if self.suspends(prompt):
            self._suspended.append(claim)
            return
        self._complete(claim)

    def _complete(self, claim: InferenceClaim) -> None:
        delta = {"index": 0, "text": _prompt(claim).upper(), "finish": "stop"}
        self._send(claim, {"type": "generated", "deltas": [delta]})
        self._send(claim, {"type": "answered", "completion_tokens": 3})

    def _send(self, claim: InferenceClaim, event: dict[str, Any]) -> None:
        self._connections.send(claim.reply_to, request_id=claim.request_id, claim_id=claim.claim_id, event=event)


def _prompt(claim: InferenceClaim) -> str:
    assert claim.body is not None
    return claim.body["prompts"][0] if "prompts" in claim.body else claim.body["messages"][-1]["content"]


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
